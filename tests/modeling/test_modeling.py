from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.tiny import IMAGE_TOKEN_ID, TEXT, VISION, left_pad, prompt, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel
from transformers_delta_llava.modeling import CACHE_NAME
from transformers_delta_llava.modeling.configuration_delta_llava import SELECT_STRATEGIES


LANGUAGE_MODELS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "seed_oss")


def make_model(config=None, seed=0):
    torch.manual_seed(seed)
    return DeltaLlavaForConditionalGeneration(config or tiny_config()).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mixed_batch(pixel_values):
    """Four prompts: one image, two images, none, two images with other budgets; as a batch and one by one."""
    rows = [([9], [0]), ([36, 4], [1, 2]), ([], []), ([1, 144], [3, 4])]
    ids = [prompt(budgets, seed=index) for index, (budgets, _) in enumerate(rows)]
    images = {
        "pixel_values": pixel_values,
        "num_visual_tokens": torch.tensor([b for budgets, _ in rows for b in budgets]),
    }
    singles = []
    for row, (budgets, chosen) in zip(ids, rows):
        single = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        if chosen:
            single |= {"pixel_values": pixel_values[chosen], "num_visual_tokens": budgets}
        singles.append(single)
    return {**left_pad(ids), **images}, singles


class TestBatches:
    @torch.no_grad()
    def test_logits_of_a_mixed_batch_equal_single_runs(self, model, mixed_batch):
        batch, singles = mixed_batch
        logits = model(**batch).logits
        for row, single in zip(logits, singles):
            expected = model(**single).logits[0]
            torch.testing.assert_close(row[-len(expected) :], expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"cache_implementation": "static"},
            {"use_cache": False},
            {"num_beams": 3},
            {"num_beams": 3, "num_return_sequences": 2},
        ],
        ids=str,
    )
    def test_generation_of_a_mixed_batch_equals_single_runs(self, model, mixed_batch, options):
        options = {**options, "max_new_tokens": 6, "do_sample": False}
        batch, singles = mixed_batch
        copies = options.get("num_return_sequences", 1)
        generated = model.generate(**batch, **options)[:, -6:].split(copies)
        for row, single in zip(generated, singles):
            assert torch.equal(row, model.generate(**single, **options)[:, -6:])

    def test_expanding_keeps_the_images_of_a_row_together(self, model, pixel_values):
        """What transformers calls before beams, on the versions that have not encoded the images by then."""
        batch = left_pad([prompt([9, 4]), prompt([]), prompt([9])])
        for inputs in (batch, {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}):
            input_ids, expanded = model._expand_inputs_for_generation(
                2, **inputs, pixel_values=pixel_values[:3], num_visual_tokens=torch.tensor([9, 4, 9])
            )
            features = model.get_image_features(pixel_values[:3], [9, 4, 9]).pooler_output
            repeated = expanded["mm_encoder_outputs"]["image"].pooler_output
            for tokens, image in zip(repeated, [0, 1, 0, 1, 2, 2], strict=True):
                assert torch.equal(tokens, features[image])
            assert "pixel_values" not in expanded and "num_visual_tokens" not in expanded
            assert len(input_ids if input_ids is not None else expanded["inputs_embeds"]) == 6

    @pytest.mark.parametrize("beams", [1, 2])
    def test_prompts_that_share_an_image_share_its_features(self, model, pixel_values, beams):
        batch = left_pad([prompt([9], seed=seed) for seed in range(3)])
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        images = {"pixel_values": pixel_values[:1].repeat(3, 1, 1, 1), "num_visual_tokens": 9}
        expected = model.generate(**batch, **images, **options)
        features = model.get_image_features(pixel_values[:1], 9)
        features.pooler_output = features.pooler_output * 3
        encoded = []
        hook = model.model.vision_tower.embeddings.register_forward_hook(lambda *_: encoded.append(True))
        shared = model.generate(**batch, mm_encoder_outputs={"image": features}, **options)
        assert not encoded
        model.generate(**batch, **images, **options)
        hook.remove()
        assert len(encoded) == 1, "beams share the features of their image, too"
        assert torch.equal(shared, expected)

    def test_images_are_dropped_once_they_are_in_the_cache(self, model, pixel_values):
        kwargs = {"pixel_values": pixel_values, "num_visual_tokens": 9, "attention_mask": torch.ones(1, 3)}
        kwargs["mm_encoder_outputs"] = {"image": None}
        first = model.prepare_inputs_for_generation(torch.ones(1, 3).long(), is_first_iteration=True, **kwargs)
        later = model.prepare_inputs_for_generation(torch.ones(1, 3).long(), **kwargs)
        uncached = model.prepare_inputs_for_generation(torch.ones(1, 3).long(), use_cache=False, **kwargs)
        assert first["pixel_values"] is uncached["pixel_values"] is pixel_values
        assert not {"pixel_values", "num_visual_tokens", "mm_encoder_outputs"} & set(later)

    def test_sampled_copies_see_the_images_of_their_own_row(self, model, pixel_values):
        batch = left_pad([prompt([9, 9], seed=1), prompt([9], seed=2)])
        images = {"pixel_values": pixel_values[:3], "num_visual_tokens": 9}
        expected = model.generate(**batch, **images, max_new_tokens=4, do_sample=False)
        copies = model.generate(**batch, **images, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2)
        assert torch.equal(copies[::2], expected) and torch.equal(copies[1::2], expected)

    @pytest.mark.parametrize("how", ["prompt lookup", "own assistant", "other assistant"])
    def test_assisted_generation(self, model, pixel_values, how, logged_deprecations):
        inputs = {**left_pad([prompt([9])]), "pixel_values": pixel_values[:1], "num_visual_tokens": 9}
        options = {
            "prompt lookup": {"prompt_lookup_num_tokens": 2},
            "own assistant": {"assistant_model": model},
            "other assistant": {"assistant_model": make_model(seed=5)},
        }[how]
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, **options), expected)
        logged_deprecations.clear()  # how transformers calls its assistant


class TestForward:
    def test_default_budget_is_the_configs(self, model, pixel_values):
        ids = prompt([36])[None]
        outputs = model(input_ids=ids, pixel_values=pixel_values[:1])
        assert outputs.image_outputs.pooler_output[0].shape == (36, 48)
        explicit = model(input_ids=ids, pixel_values=pixel_values[:1], num_visual_tokens=36)
        assert torch.equal(outputs.logits, explicit.logits)

    def test_visual_tokens_land_on_their_placeholders(self, model, pixel_values):
        ids = prompt([4, 9])[None]
        features = model.get_image_features(pixel_values[:2], [4, 9]).pooler_output
        assert [tuple(tokens.shape) for tokens in features] == [(4, 48), (9, 48)]
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[ids == IMAGE_TOKEN_ID] = torch.cat(features)
        expected = model(inputs_embeds=embeds).logits
        actual = model(input_ids=ids, pixel_values=pixel_values[:2], num_visual_tokens=[4, 9]).logits
        assert torch.equal(actual, expected)

    def test_placeholders_are_found_in_inputs_embeds(self, model, pixel_values):
        ids = prompt([36])[None]
        embeds = model.get_input_embeddings()(ids)
        before = embeds.clone()
        actual = model(inputs_embeds=embeds, pixel_values=pixel_values[:1]).logits
        assert torch.equal(actual, model(input_ids=ids, pixel_values=pixel_values[:1]).logits)
        assert torch.equal(embeds, before), "the caller's embeddings must not change"

    def test_encoded_images_can_be_given_instead_of_pixels(self, model, pixel_values):
        ids = prompt([36])[None]
        encoded = {"image": model.get_image_features(pixel_values[:1])}
        actual = model(input_ids=ids, mm_encoder_outputs=encoded).logits
        assert torch.equal(actual, model(input_ids=ids, pixel_values=pixel_values[:1]).logits)
        with pytest.raises(ValueError, match="pixel_values and mm_encoder_outputs"):
            model(input_ids=ids, pixel_values=pixel_values[:1], mm_encoder_outputs=encoded)

    def test_logits_to_keep(self, model, pixel_values):
        inputs = {"input_ids": prompt([36])[None], "pixel_values": pixel_values[:1]}
        logits = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])
        torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])

    def test_loss_is_the_shifted_cross_entropy(self, model, pixel_values):
        ids = prompt([36])[None]
        labels = ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)
        outputs = model(
            input_ids=ids, pixel_values=pixel_values[:1], labels=labels, mm_token_type_ids=torch.zeros_like(ids)
        )
        expected = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels[0, 1:])
        torch.testing.assert_close(outputs.loss, expected)

    def test_outputs_have_the_cache_under_both_names(self, model, logged_deprecations):
        ids = prompt([])[None]
        outputs = [model(input_ids=ids), model.model(input_ids=ids)]
        for output in outputs:
            assert output[CACHE_NAME].get_seq_length() == ids.shape[1]
            assert getattr(output, CACHE_NAME) is output[CACHE_NAME]
        assert not logged_deprecations
        assert all(output.past_key_values is output[CACHE_NAME] for output in outputs)
        if CACHE_NAME == "cache":  # transformers announces the end of the older name
            assert "`past_key_values`/`cache_params` are deprecated" in logged_deprecations.pop()

    @pytest.mark.parametrize("num_visual_tokens", [None, 36, [36, 36], torch.tensor([36, 36])], ids=str)
    def test_forms_of_one_budget(self, model, pixel_values, num_visual_tokens):
        features = model.get_image_features(pixel_values[:2], num_visual_tokens).pooler_output
        assert torch.equal(
            torch.stack(features), torch.stack(model.get_image_features(pixel_values[:2]).pooler_output)
        )


class TestErrors:
    def test_wrong_number_of_placeholders(self, model, pixel_values):
        with pytest.raises(ValueError, match="35 .* 36 visual tokens"):
            model(input_ids=prompt([35])[None], pixel_values=pixel_values[:1])

    def test_unknown_budget(self, model, pixel_values):
        with pytest.raises(ValueError, match="num_visual_tokens=7 .* 144, 36, 16, 9, 4, 1"):
            model(input_ids=prompt([7])[None], pixel_values=pixel_values[:1], num_visual_tokens=7)

    def test_wrong_number_of_budgets(self, model, pixel_values):
        with pytest.raises(ValueError, match="num_visual_tokens has 2 numbers for 1 images"):
            model(input_ids=prompt([9])[None], pixel_values=pixel_values[:1], num_visual_tokens=[9, 9])

    def test_ids_and_embeddings(self, model):
        ids = prompt([])[None]
        with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
            model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
        with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
            model()


class TestVisionTower:
    def count_layers(self, model, pixel_values):
        runs = []
        layers = model.model.vision_tower.encoder.layers
        handles = [
            layer.register_forward_hook(lambda *_, index=index: runs.append(index))
            for index, layer in enumerate(layers, 1)
        ]
        outputs = model.get_image_features(pixel_values[:1])
        for handle in handles:
            handle.remove()
        return runs, outputs

    def test_only_layers_in_use_run_and_no_states_are_kept(self, pixel_values):
        model = make_model(tiny_config(vision_feature_layer=2, vision_feature_levels=[0, 1]))
        runs, outputs = self.count_layers(model, pixel_values)
        assert runs == [1, 2]
        assert outputs.hidden_states is None

    @pytest.mark.parametrize("tower", SELECT_STRATEGIES)
    def test_partial_run_equals_the_full_run(self, tower, pixel_values):
        strategy = SELECT_STRATEGIES[tower]
        levels = [0, 2, 3]
        config = tiny_config(
            {"model_type": tower}, vision_feature_levels=levels, vision_feature_select_strategy=strategy
        )
        model = make_model(config)
        runs = []
        layers = next(module for module in model.model.vision_tower.modules() if isinstance(module, nn.ModuleList))
        layers[-1].register_forward_hook(lambda *_: runs.append(1))
        partial = model.get_image_features(pixel_values[:2])
        assert not runs  # the deepest level is 3 of 4
        full = model.get_image_features(pixel_values[:2], output_hidden_states=True)
        assert len(full.hidden_states) == 5
        assert torch.equal(torch.stack(partial.pooler_output), torch.stack(full.pooler_output))

    def test_registers_are_no_patches(self, pixel_values):
        """DINOv2 with registers: five tokens before the 144 patches."""
        model = make_model(tiny_config({"model_type": "dinov2_with_registers"}, vision_feature_layer=3))
        features = model.model.get_patch_features(pixel_values[:1], output_hidden_states=True)
        assert features.outputs.hidden_states[3].shape[1] == 5 + 144
        assert torch.equal(features.stream, features.outputs.hidden_states[3][:, 5:])

    def test_one_run_of_the_tower_serves_every_number_of_visual_tokens(self, model, pixel_values):
        runs = []
        handle = model.model.vision_tower.embeddings.register_forward_hook(lambda *_: runs.append(1))
        features = model.model.get_patch_features(pixel_values[:2])
        projected = {number: model.model.project_features(features, number) for number in (None, 144, 4)}
        mixed = model.model.project_features(features, [9, 1])
        handle.remove()
        assert len(runs) == 1
        for number, tokens in projected.items():
            expected = model.get_image_features(pixel_values[:2], number).pooler_output
            assert torch.equal(torch.stack(tokens), torch.stack(expected))
        assert [len(tokens) for tokens in mixed] == [9, 1]

    def test_attentions_on_request(self, pixel_values):
        model = make_model()
        model.set_attn_implementation("eager")
        outputs = model.get_image_features(pixel_values[:1], output_attentions=True)
        assert len(outputs.attentions) == 4 and outputs.hidden_states is None

    def test_another_kind_of_tower(self, pixel_values):
        """A tower that the model does not know runs in full, through its own forward."""
        vision = {**VISION, "model_type": "vit"}
        model = make_model(tiny_config(vision))
        assert [tokens.shape for tokens in model.get_image_features(pixel_values[:1]).pooler_output] == [(36, 48)]


class TestAttention:
    @torch.no_grad()
    @pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
    def test_implementations_agree_with_sdpa(self, implementation, pixel_values):
        model = make_model()
        inputs = {"input_ids": prompt([36])[None], "pixel_values": pixel_values[:1]}
        expected = model(**inputs).logits
        model.set_attn_implementation(implementation)
        used = {module.config._attn_implementation for module in model.modules() if hasattr(module, "is_causal")}
        assert used == {implementation}
        with torch.compiler.set_stance("force_eager"):  # compiling flex attention takes a minute
            logits = model(**inputs).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    def test_of_one_part(self):
        model = make_model()
        model.set_attn_implementation({"vision_config": "eager"})
        assert model.model.multi_modal_projector.block.attention.config._attn_implementation == "eager"
        assert model.model.language_model.config._attn_implementation == "sdpa"


class TestTraining:
    def make_inputs(self, pixel_values):
        ids = prompt([36, 36])[None]
        return {"input_ids": ids, "pixel_values": pixel_values[:2], "labels": ids}

    def gradients(self, model, inputs):
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    def test_gradient_checkpointing_is_exact(self, pixel_values):
        model = make_model(tiny_config(projector_drop_path=0.0)).train()
        expected = {name: grad.clone() for name, grad in self.gradients(model, self.make_inputs(pixel_values)).items()}
        model.gradient_checkpointing_enable()
        actual = self.gradients(model, self.make_inputs(pixel_values))
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])

    def test_every_projector_parameter_learns(self, pixel_values):
        gradients = self.gradients(make_model().train(), self.make_inputs(pixel_values))
        for name, _ in make_model().model.multi_modal_projector.named_parameters():
            gradient = gradients[f"model.multi_modal_projector.{name}"]
            assert gradient.isfinite().all(), name
            # A bias that is the same for all keys cancels in the softmax.
            assert gradient.any() or name.endswith("key.bias"), name


class TestLoading:
    def test_round_trip_of_both_models(self, model, pixel_values, tmp_path):
        model.save_pretrained(tmp_path)
        inputs = {"input_ids": prompt([36])[None], "pixel_values": pixel_values[:1]}
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert type(loaded) is DeltaLlavaForConditionalGeneration
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        base = AutoModel.from_pretrained(tmp_path)
        assert type(base) is DeltaLlavaModel
        assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)

    @torch.no_grad()
    def test_half_precision_projector_between_float32_parts(self, pixel_values):
        """Features are cast at the boundaries, so the parts may have dtypes of their own."""
        model = make_model()
        inputs = {"input_ids": prompt([36])[None], "pixel_values": pixel_values[:1]}
        expected = model(**inputs).logits
        model.model.multi_modal_projector.to(torch.bfloat16)
        assert model.get_image_features(pixel_values[:1]).pooler_output[0].dtype == torch.bfloat16
        logits = model(**inputs).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=2e-2, rtol=0)

    @torch.no_grad()
    @pytest.mark.parametrize(
        "on_disk", [("model.vision_tower", "model.language_model"), ("model.multi_modal_projector", "lm_head")]
    )
    def test_offloading(self, model, pixel_values, tmp_path, on_disk):
        model.save_pretrained(tmp_path / "model")
        parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
        device_map = {part: "disk" if part in on_disk else "cpu" for part in parts}
        loaded = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        for budget in (144, 36):  # at 144 a part of the projector is skipped
            inputs = {"input_ids": prompt([budget])[None], "pixel_values": pixel_values[:1]}
            inputs["num_visual_tokens"] = budget
            torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)

    @pytest.mark.parametrize("budget, gradients", [(144, False), (36, True)])
    def test_compiles_without_graph_breaks(self, pixel_values, budget, gradients):
        model = make_model(
            tiny_config(text={"num_hidden_layers": 1}, vision_feature_levels=[1, 2], vision_feature_layer=1)
        )
        inputs = {"input_ids": prompt([budget])[None], "pixel_values": pixel_values[:1], "num_visual_tokens": budget}
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)

    def test_a_ninth_combination_of_numbers_compiles_with_the_line_in_the_documentation(self, pixel_values):
        model = make_model(tiny_config(vision_feature_levels=[1], use_transformer_block=False))
        torch._dynamo.reset()
        compiled = torch.compile(model.model.project_features, fullgraph=True, backend="eager")
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            features = model.model.get_patch_features(pixel_values[:2])
            for numbers in product((1, 4, 9), repeat=2):
                assert [len(tokens) for tokens in compiled(features, list(numbers))] == list(numbers)


class TestLanguageModels:
    @torch.no_grad()
    @pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
    def test_text_equals_the_plain_language_model(self, model_type, pixel_values, tmp_path):
        torch.manual_seed(0)
        text_config = tiny_config(text={"model_type": model_type}).text_config
        AutoModelForCausalLM.from_config(text_config).save_pretrained(tmp_path / "text")
        CLIPVisionModel(tiny_config().vision_config).save_pretrained(tmp_path / "vision")
        model = DeltaLlavaForConditionalGeneration.from_vision_text_pretrained(
            tmp_path / "vision", tmp_path / "text", image_token_id=IMAGE_TOKEN_ID, vision_feature_levels=[1, 2]
        )
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
        text = prompt([])[None]
        torch.testing.assert_close(model(input_ids=text).logits, plain(input_ids=text).logits)
        inputs = {**left_pad([prompt([36])]), "pixel_values": pixel_values[:1]}
        assert model.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3
        model.save_pretrained(tmp_path / "model")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)

    def test_gemma_scales_visual_tokens_like_text(self, pixel_values):
        """As it did when Delta-LLaVA was released: it multiplied all of inputs_embeds by sqrt(hidden_size)."""
        model = make_model(tiny_config(text={"model_type": "gemma"}))
        projected = []
        model.model.multi_modal_projector.register_forward_hook(lambda *args: projected.append(args[2]))
        features = model.get_image_features(pixel_values[:1]).pooler_output[0]
        torch.testing.assert_close(features, projected[0][0] * 48**0.5)


class TestFromVisionTextPretrained:
    class Processor:
        """What the constructor reads of a processor."""

        image_token_id, video_token_id = 100, None
        tokenizer = range(101)

    @pytest.fixture
    def text_folder(self, tmp_path):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "text")
        return tmp_path / "text"

    def test_from_a_full_clip_model(self, text_folder, tmp_path, pixel_values):
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 9,
        }
        clip = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text))
        clip.save_pretrained(tmp_path / "clip")
        model = DeltaLlavaForConditionalGeneration.from_vision_text_pretrained(
            tmp_path / "clip", text_folder, self.Processor(), vision_feature_levels=[1, 2], delta_rank=4
        )
        assert model.config.image_token_id == 100
        assert model.config.text_config.vocab_size == model.lm_head.out_features == 128
        assert model.model.multi_modal_projector.query.delta_u.shape == (64, 4)
        assert not model.training
        assert all(parameter.device.type == "cpu" and parameter.isfinite().all() for parameter in model.parameters())
        expected = clip.vision_model.embeddings.patch_embedding.weight
        assert torch.equal(model.model.vision_tower.embeddings.patch_embedding.weight, expected)

    def test_from_siglip(self, text_folder, tmp_path, pixel_values):
        config = SiglipVisionConfig(**{key: value for key, value in VISION.items() if key != "model_type"})
        SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
        model = DeltaLlavaForConditionalGeneration.from_vision_text_pretrained(
            tmp_path / "siglip", text_folder, dtype=torch.bfloat16, image_token_id=99, vision_feature_levels=[1, 2]
        )
        assert model.config.vision_feature_select_strategy == "full"
        assert model.dtype == model.model.multi_modal_projector.dtype == torch.bfloat16
        assert model(input_ids=prompt([36])[None], pixel_values=pixel_values[:1]).logits.isfinite().all()

    @pytest.mark.parametrize("tower", ["dinov2", "dinov2_with_registers"])
    def test_from_dinov2_saved_and_loaded_and_resumed(self, tower, text_folder, tmp_path, pixel_values):
        AutoModel.from_config(tiny_config({"model_type": tower}).vision_config).save_pretrained(tmp_path / "dinov2")
        model = DeltaLlavaForConditionalGeneration.from_vision_text_pretrained(
            tmp_path / "dinov2", text_folder, image_token_id=99, vision_feature_levels=[1, 2]
        )
        model.save_pretrained(tmp_path / "joined")
        names = load_file(tmp_path / "joined" / "model.safetensors")
        assert "model.vision_tower.encoder.layer.0.attention.attention.query.weight" in names  # as files have it
        loaded = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "joined")
        again = make_model(loaded.config)
        again.load_state_dict(names, strict=False)  # as transformers' Trainer resumes
        expected = model.get_image_features(pixel_values[:1]).pooler_output[0]
        for other in (loaded, again):
            assert torch.equal(other.get_image_features(pixel_values[:1]).pooler_output[0], expected)

    @pytest.mark.parametrize("layout", ["released", "paper"])
    def test_calibrated_on_images_visual_tokens_resemble_text(self, layout, text_folder, tmp_path):
        CLIPVisionModel(tiny_config().vision_config).save_pretrained(tmp_path / "vision")
        pixel_values = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        model = DeltaLlavaForConditionalGeneration.from_vision_text_pretrained(
            tmp_path / "vision",
            text_folder,
            image_token_id=99,
            vision_feature_levels=[1, 2],
            projector_layout=layout,
            pixel_values=pixel_values,
        )
        tokens = torch.cat(model.get_image_features(pixel_values).pooler_output)
        text_rms = model.get_input_embeddings().weight.square().mean().sqrt()
        torch.testing.assert_close(tokens.mean(0), torch.zeros(48), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens.square().mean().sqrt(), text_rms, atol=0, rtol=1e-4)
        for parameter in model.model.multi_modal_projector.parameters():
            nn.init.zeros_(parameter)
        with pytest.raises(ValueError, match="do not differ"):
            model.calibrate_projector(pixel_values)

    def test_needs_to_know_the_placeholder(self, text_folder, tmp_path):
        CLIPVisionModel(tiny_config().vision_config).save_pretrained(tmp_path / "vision")
        with pytest.raises(ValueError, match="Pass the processor, or image_token_id"):
            DeltaLlavaForConditionalGeneration.from_vision_text_pretrained(tmp_path / "vision", text_folder)

    def test_refuses_a_head_with_a_bias(self, tmp_path):
        config = tiny_config(text={"model_type": "phi"}).text_config
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "phi")
        with pytest.raises(ValueError, match="the head of this language model has a bias"):
            DeltaLlavaForConditionalGeneration.from_vision_text_pretrained(
                tmp_path, tmp_path / "phi", image_token_id=1
            )
