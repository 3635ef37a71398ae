"""`generate` from embeddings, from a cache that holds images already, and with token healing."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import decoders

from tests.tiny import IMAGE_TOKEN_ID, left_pad, prompt, tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.modeling.modeling_delta_llava import CACHE_NAME


GREEDY = {"max_new_tokens": 6, "do_sample": False}
BUDGETS = [[9], [36, 4], []]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(tiny_config()).eval()


@pytest.fixture(scope="module")
def images():
    budgets = [budget for row in BUDGETS for budget in row]
    pixel_values = torch.randn(len(budgets), 3, 24, 24, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixel_values, "num_visual_tokens": torch.tensor(budgets)}


@pytest.fixture(scope="module")
def batch():
    return left_pad([prompt(budgets, seed=seed) for seed, budgets in enumerate(BUDGETS)])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}], ids=str
)
class TestEmbeddings:
    """As in LLaVA, what comes back holds the new tokens alone."""

    def test_of_text(self, model, options):
        ids = prompt([])[None]
        expected = model.generate(ids, **{**GREEDY, **options})[:, ids.shape[1] :]
        assert torch.equal(
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), **{**GREEDY, **options}), expected
        )

    def test_with_visual_tokens_in_them(self, model, batch, images, options):
        expected = model.generate(**batch, **images, **{**GREEDY, **options})[:, batch["input_ids"].shape[1] :]
        embeds = model.get_input_embeddings()(batch["input_ids"]).clone()
        features = model.get_image_features(**images, return_dict=True).pooler_output
        embeds[batch["input_ids"] == IMAGE_TOKEN_ID] = torch.cat(features)
        actual = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **{**GREEDY, **options})
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("with_ids", [False, True])
    def test_with_pixel_values(self, model, batch, images, options, with_ids):
        prompts = batch["input_ids"]
        expected = model.generate(**batch, **images, **{**GREEDY, **options})[:, prompts.shape[1] :]
        actual = model.generate(
            prompts if with_ids else None,
            inputs_embeds=model.get_input_embeddings()(prompts),
            attention_mask=batch["attention_mask"],
            **images,
            **{**GREEDY, **options},
        )
        assert torch.equal(actual[:, prompts.shape[1] if with_ids else 0 :], expected)


class TestCachedImages:
    """A conversation goes on from its cache, with all its images given again."""

    @pytest.mark.parametrize("more", [[[16], []], [[], []], [[4, 1], [9]]], ids=str)
    @pytest.mark.parametrize("encoded", [False, True])
    @pytest.mark.parametrize("embedded", [False, True])
    def test_those_in_the_cache_are_dropped(self, model, more, encoded, embedded):
        first = [[9], [36, 4]]
        generator = torch.Generator().manual_seed(1)
        images = {budget: torch.randn(3, 24, 24, generator=generator) for budget in (1, 4, 9, 16, 36)}

        def show(rows: list[list[int]]) -> dict:
            budgets = [budget for row in rows for budget in row]
            if not budgets:
                return {}
            shown = {"pixel_values": torch.stack([images[budget] for budget in budgets])}
            shown["num_visual_tokens"] = torch.tensor(budgets)
            if encoded:
                return {"mm_encoder_outputs": {"image": model.get_image_features(**shown, return_dict=True)}}
            return shown

        start = left_pad([prompt(budgets, seed=seed) for seed, budgets in enumerate(first)])
        # One length for both rows: text fills the end of the shorter one.
        added = [prompt(budgets, seed=9 + seed) for seed, budgets in enumerate(more)]
        length = max(map(len, added))
        added = torch.stack([torch.cat([torch.full((length - len(ids),), 7), ids]) for ids in added])
        inputs = {
            "input_ids": torch.cat([start["input_ids"], added], dim=1),
            "attention_mask": torch.cat([start["attention_mask"], torch.ones_like(added)], dim=1),
        }
        if embedded:
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
        every = [one + other for one, other in zip(first, more)]
        expected = model.generate(**inputs, **show(every), **GREEDY)
        for given in (every, more):
            cache = model(**start, **show(first), use_cache=True)[CACHE_NAME]
            assert torch.equal(model.generate(**inputs, **show(given), **{CACHE_NAME: cache}, **GREEDY), expected)

    def test_in_chunks(self, model, images):
        """Older transformers read the prompt from its start, and without its images."""
        first, both = prompt([9])[None], torch.cat([prompt([9])[None], prompt([36], seed=9)[None]], dim=1)
        shown = {"pixel_values": images["pixel_values"][:2], "num_visual_tokens": [9, 36]}
        options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
        expected = model.generate(both, **shown, **options).logits
        for size in (8, 64):
            cache = model(first, pixel_values=shown["pixel_values"][:1], num_visual_tokens=9, use_cache=True)[
                CACHE_NAME
            ]
            options |= {CACHE_NAME: cache, "prefill_chunk_size": size}
            if CACHE_NAME == "cache":
                actual = model.generate(both, **shown, **options).logits
                torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
            else:
                with pytest.raises(ValueError, match="prefill_chunk_size: .* or use transformers 5.24"):
                    model.generate(both, **shown, **options)

    def test_from_what_generate_returned(self, model, images):
        pixel_values = images["pixel_values"]
        ids = prompt([36])[None]
        first = model.generate(ids, pixel_values=pixel_values[:1], return_dict_in_generate=True, **GREEDY)
        more = torch.cat([first.sequences, prompt([36], seed=5)[None]], dim=1)
        mask = torch.ones_like(more)
        expected = model.generate(more, attention_mask=mask, pixel_values=pixel_values[:2], **GREEDY)
        cache = {CACHE_NAME: first[CACHE_NAME]}
        assert torch.equal(
            model.generate(more, attention_mask=mask, pixel_values=pixel_values[:2], **cache, **GREEDY), expected
        )


def test_prompts_in_chunks_keep_their_images_or_are_refused(model, batch, images):
    """Older transformers read them without their images."""
    expected = model.generate(**batch, **images, **GREEDY)
    try:
        actual = model.generate(**batch, **images, **GREEDY, prefill_chunk_size=16)
    except ValueError as error:
        assert "5.24" in str(error) and Version(transformers.__version__) < Version("5.24")
    else:
        assert torch.equal(actual, expected)
    text = {name: batch[name][2:] for name in batch}
    expected = model.generate(**text, **GREEDY)
    assert torch.equal(model.generate(**text, **GREEDY, prefill_chunk_size=16), expected)


class TestBudgetsFromTheText:
    """A caller that drops `num_visual_tokens`, as TRL's GRPOTrainer does."""

    def test_are_the_numbers_of_placeholders_in_a_row(self, model, batch, images):
        expected = model(**batch, **images).logits
        assert torch.equal(model(**batch, pixel_values=images["pixel_values"]).logits, expected)

    @pytest.mark.parametrize("budgets", [[9 + 9], [8, 9], [36, 4, 4]])
    def test_are_refused_where_they_do_not_fit(self, model, images, budgets):
        with pytest.raises(
            ValueError, match=f"The text has {sum(budgets)} image placeholders and the images give 72 "
        ):
            model(input_ids=prompt(budgets)[None], pixel_values=images["pixel_values"][:2])


class TestTokenHealing:
    def test_the_last_token_is_healed_and_the_images_stay(self, model):
        tokenizer = tiny_processor(model.config).tokenizer
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()
        ids = torch.tensor(tokenizer(["<image>" * 9 + "cd<", "cd<"], padding=True).input_ids)
        better = tokenizer.convert_tokens_to_ids("<unused2>")
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.lm_head.weight[better] = model.model(ids[1:, -3:-1]).last_hidden_state[0, -1]
        healed = model.heal_tokens(ids, tokenizer)
        assert torch.equal(healed[:, :-1], ids[:, :-1]) and healed[:, -1].tolist() == [better, better]

    def test_a_prompt_with_an_image_is_answered(self, model, images):
        processor = tiny_processor(model.config)
        ids = torch.tensor([processor.tokenizer("<image>" * 9 + "abc").input_ids])
        shown = {"pixel_values": images["pixel_values"][:1], "num_visual_tokens": 9}
        expected = model.generate(ids, **shown, **GREEDY)
        healed = model.generate(ids, **shown, token_healing=True, tokenizer=processor.tokenizer, **GREEDY)
        assert torch.equal(healed, expected)
