"""transformers' `ModelTesterMixin` and `ConfigTester`, run on tiny Delta-LLaVA models.

The mixin's files come from the source distribution of the installed transformers (`tests/transformers_tests.py`).
"""

import copy
import os
import random
import unittest
import warnings

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
    ViTConfig,
)

from tests import transformers_tests
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaModel
from transformers_delta_llava.modeling import CACHE_NAME


try:
    common = transformers_tests.load("test_modeling_common")
    configuration = transformers_tests.load("test_configuration_common")
except transformers_tests.TestsUnavailable as reason:
    if os.environ.get("CI"):
        raise
    pytest.skip(str(reason), allow_module_level=True)

# What a test asks of a class depends on transformers' lists of class names. These list ours, only in the test module.
for names, class_name in (
    ("MODEL_MAPPING_NAMES", "DeltaLlavaModel"),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "DeltaLlavaForConditionalGeneration"),
):
    setattr(common, names, {**getattr(common, names), "delta_llava": class_name})

# Tests that cannot apply, and why. The mixin itself skips those that need a GPU, flash attention, DeepSpeed or a
# mixture of experts, and those for models with a `base_model_class`, which are text-only.
NOT_APPLICABLE = {
    "test_generation_tester_mixin_inheritance": "GenerationTesterMixin is in no distribution of transformers",
    "test_bc_torch_dtype": "an argument of from_pretrained that no class here reads; takes four seconds",
}
# Parameters of the towers' outputs that no Delta-LLaVA reads; they get no gradient.
UNUSED_PARAMETERS = ("vision_tower.post_layernorm.", "vision_tower.head.")


class ModelTester:
    """Tiny configs and inputs: one image per row, at the start of the row."""

    batch_size = 3
    image_size = 16
    patch_size = 4
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99
    image_token_id = 3  # low, because a test shrinks the vocabulary
    num_image_tokens = 4
    seq_length = encoder_seq_length = num_image_tokens + 7
    is_training = True
    config_kwargs: dict = {}

    def __init__(self) -> None:
        layers = {
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
        }
        self.vision_config = self.make_vision_config(image_size=self.image_size, patch_size=self.patch_size, **layers)
        self.text_config = self.make_text_config(
            vocab_size=self.vocab_size,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **layers,
        )

    def make_vision_config(self, **sizes: int) -> PreTrainedConfig:
        return CLIPVisionConfig(**sizes)

    def make_text_config(self, **sizes: int) -> PreTrainedConfig:
        return LlamaConfig(**sizes)

    def get_config(self) -> DeltaLlavaConfig:
        return DeltaLlavaConfig(
            vision_config=copy.deepcopy(self.vision_config),  # the tests change it
            text_config=copy.deepcopy(self.text_config),
            image_token_id=self.image_token_id,
            vision_feature_levels=[0, 1, 2],
            delta_rank=4,
            projector_head_dim=8,
            projector_num_attention_heads=4,
            **self.config_kwargs,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[DeltaLlavaConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        first_text_id = self.image_token_id + 1
        rng = random.Random(0)
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - first_text_id, rng=rng)
        input_ids += first_text_id
        input_ids[:, : self.num_image_tokens] = self.image_token_id
        pixel_values = common.floats_tensor([self.batch_size, 3, self.image_size, self.image_size], rng=rng)
        attention_mask = torch.ones_like(input_ids)
        return config, {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}


class PaperModelTester(ModelTester):
    """The other layout, a tower without class token, tied embeddings."""

    config_kwargs = {"projector_layout": "paper", "vision_feature_select_strategy": "full"}

    def make_vision_config(self, **sizes: int) -> PreTrainedConfig:
        return SiglipVisionConfig(**sizes)

    def make_text_config(self, **sizes: int) -> PreTrainedConfig:
        return Qwen2Config(tie_word_embeddings=True, **sizes)


class CommonTests(common.ModelTesterMixin, transformers_tests.GenerationTesterMixin):
    all_model_classes = (DeltaLlavaModel, DeltaLlavaForConditionalGeneration)
    model_tester_class = ModelTester
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    test_all_params_have_gradient = False  # see test_used_parameters_have_gradients

    def setUp(self) -> None:
        if self._testMethodName in NOT_APPLICABLE:
            self.skipTest(NOT_APPLICABLE[self._testMethodName])
        if self._testMethodName.endswith("_sdpa_kernels"):
            self.skipTest("CPUs have one kernel, whatever is enabled")
        self.model_tester = self.model_tester_class()

    def test_config(self) -> None:
        configuration.ConfigTester(
            self, DeltaLlavaConfig, has_text_modality=False, common_properties=["image_token_id", "scale_factor"]
        ).run_common_tests()

    def test_can_init_all_missing_weights(self) -> None:
        # transformers does not run CLIP's and SigLIP's initialisation of whole blocks when they are part of a class
        # from outside transformers. ViT initialises layer by layer.
        tester = self.model_tester
        tester.config_kwargs = {**tester.config_kwargs, "vision_feature_select_strategy": "default"}
        tester.vision_config = ViTConfig(
            image_size=tester.image_size,
            patch_size=tester.patch_size,
            hidden_size=tester.hidden_size,
            intermediate_size=37,
            num_hidden_layers=tester.num_hidden_layers,
            num_attention_heads=tester.num_attention_heads,
        )
        super().test_can_init_all_missing_weights()

    def _check_features_ignore_output_hidden_states(self, model_class, config, inputs, method_name) -> None:
        # The mixin's version also compares `last_hidden_state`. Ours is the deepest state that the projector needs:
        # the layers above it, and a norm after the last one, are not computed.
        model = model_class(copy.deepcopy(config)).eval()
        with torch.no_grad():
            features = getattr(model, method_name)(**inputs)
            features_all = getattr(model, method_name)(**{**inputs, "output_hidden_states": True})
        torch.testing.assert_close(features.pooler_output, features_all.pooler_output)
        assert features.hidden_states is None

    def test_bc_cache_name_forward(self) -> None:
        # The mixin's version wants a warning for the older name. Our forwards take both names on every version, silently.
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config)).eval()
            caches = {name: DynamicCache(config=config.get_text_config()) for name in ("cache", "past_key_values")}
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("error")
                outputs = {name: model(**inputs, **{name: cache}) for name, cache in caches.items()}
            for name, cache in caches.items():
                assert outputs[name][CACHE_NAME] is cache
                assert cache.get_seq_length() == inputs["input_ids"].shape[1]
            torch.testing.assert_close(outputs["cache"][0], outputs["past_key_values"][0])
            with pytest.raises(ValueError, match="cache and past_key_values"):
                model(**inputs, **caches)

    def test_used_parameters_have_gradients(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for checkpointing in (False, True):
            model = DeltaLlavaForConditionalGeneration(config).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
            assert not [name for name in without if not name.startswith(UNUSED_PARAMETERS, len("model."))]


class ReleasedLayoutTest(CommonTests, unittest.TestCase):
    pass


class PaperLayoutTest(CommonTests, unittest.TestCase):
    model_tester_class = PaperModelTester

    def setUp(self) -> None:
        # transformers' own masks, which the released layout has tested.
        if self._testMethodName.startswith("test_eager_matches_sdpa_inference"):
            self.skipTest("the same in both layouts")
        super().setUp()
