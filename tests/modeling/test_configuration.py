import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig
from transformers.models.auto import modeling_auto

from tests.tiny import TEXT, VISION, tiny_config
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaModel


CLIP_336 = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SIGLIP_384 = {
    "num_attention_heads": 16,
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "image_size": 384,
    "patch_size": 14,
}


def test_defaults_are_the_published_model():
    config = DeltaLlavaConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("clip_vision_model", "llama")
    assert config.grid_size == 24
    assert config.vision_feature_levels == [12, 16, 22, 23]
    assert config.num_visual_tokens == 144


@pytest.mark.parametrize(
    "scale_factor, tokens", [(1, 576), (2, 144), (3, 64), (4, 36), (6, 16), (8, 9), (12, 4), (24, 1)]
)
def test_tokens_of_clip_336(scale_factor, tokens):
    config = DeltaLlavaConfig(scale_factor=scale_factor)
    assert config.num_visual_tokens == config.image_seq_length == tokens
    assert DeltaLlavaConfig().num_visual_tokens_for(scale_factor) == tokens
    assert config.scale_factor_for(tokens) == scale_factor
    assert config.visual_token_budgets == (576, 144, 64, 36, 16, 9, 4, 1)


def test_tokens_of_other_towers():
    clip_224 = DeltaLlavaConfig(vision_config={**CLIP_336, "image_size": 224})
    assert clip_224.image_seq_length == 64
    siglip = DeltaLlavaConfig(vision_config=SIGLIP_384, scale_factor=3, vision_feature_select_strategy="full")
    assert (siglip.grid_size, siglip.image_seq_length) == (27, 81)
    assert siglip.num_window_attention_heads == 9


def test_changing_the_scale_factor_changes_the_token_count():
    config = tiny_config()
    config.scale_factor = 4
    assert config.num_visual_tokens == 9


def test_round_trip(tmp_path):
    config = tiny_config(scale_factor=4, projector_layout="paper", delta_rank=3, projector_drop_path=0.0)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DeltaLlavaConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert type(loaded.vision_config) is CLIPVisionConfig and type(loaded.text_config) is LlamaConfig
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "image_seq_length" not in stored
    assert {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"} == set(
        stored["auto_map"]
    )
    assert DeltaLlavaConfig.from_dict(config.to_diff_dict()).to_dict() == config.to_dict()


def test_sub_configs_are_kept_as_they_are():
    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**TEXT)
    config = DeltaLlavaConfig(vision_config=vision, text_config=text, image_token_id=1, vision_feature_levels=[1])
    assert config.vision_config is vision and config.text_config is text
    assert config.get_text_config() is text


@pytest.mark.parametrize(
    "text_ties, argument, expected", [(True, None, True), (False, None, False), (True, False, False)]
)
def test_tied_embeddings_follow_the_text_config(text_ties, argument, expected):
    config = tiny_config(text={"tie_word_embeddings": text_ties}, tie_word_embeddings=argument)
    assert config.tie_word_embeddings is expected


@pytest.mark.parametrize("name", ["num_visual_tokens", "image_seq_length"])
class TestNumberOfVisualTokens:
    def test_it_sets_the_scale_factor(self, name, tmp_path):
        config = tiny_config(**{name: 9})
        assert (config.scale_factor, config.num_visual_tokens, config.image_seq_length) == (4, 9, 9)
        config.save_pretrained(tmp_path)
        assert (
            json.loads((tmp_path / "config.json").read_text())
            .keys()
            .isdisjoint({"num_visual_tokens", "image_seq_length"})
        )
        for auto in (AutoConfig, DeltaLlavaConfig):
            assert auto.from_pretrained(tmp_path, **{name: 36}).scale_factor == 2
        setattr(config, name, 144)
        assert config.scale_factor == 1

    def test_it_agrees_with_the_scale_factor_or_is_refused(self, name):
        assert tiny_config(**{name: 9}, scale_factor=4).scale_factor == 4
        with pytest.raises(ValueError, match=f"{name}=99 .* scale_factor=2"):
            tiny_config(**{name: 99}, scale_factor=2)
        with pytest.raises(ValueError, match="num_visual_tokens=37 .* 144, 36, 16, 9, 4, 1"):
            tiny_config(**{name: 37})


def test_a_model_is_loaded_with_another_number_of_visual_tokens(tmp_path):
    DeltaLlavaModel(tiny_config()).save_pretrained(tmp_path)
    assert DeltaLlavaModel.from_pretrained(tmp_path, num_visual_tokens=9).config.scale_factor == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scale_factor": 5}, "scale_factor=5: .*12 x 12"),
        ({"scale_factor": 0}, "scale_factor=0"),
        ({"vision": {"model_type": "siglip_vision_model"}}, "select_strategy='default': .*'full'"),
        ({"vision_feature_select_strategy": "full"}, "select_strategy='full': .*'default'"),
        ({"vision_feature_layer": 5}, "vision_feature_layer=5: .* 0 to 4"),
        ({"vision_feature_levels": [1, -6]}, r"vision_feature_levels=\[1, -6\]: .* 0 to 4"),
        ({"vision_feature_levels": []}, r"vision_feature_levels=\[\]"),
        ({"delta_rank": 0}, "delta_rank=0: .* 1 to .* 64"),
        ({"delta_rank": 65}, "delta_rank=65"),
        ({"projector_num_attention_heads": 5}, "projector_num_attention_heads=5: .* 64"),
        ({"projector_head_dim": 24}, "projector_head_dim=24: .* 64"),
        ({"projector_head_dim": 64}, "projector_head_dim=64: .* at least 2 heads"),
        ({"text": {"vocab_size": 99}}, "image_token_id=99: .* 0 to 98"),
        ({"text": {"model_type": "cohere", "logit_scale": 0.06}}, "text_config.logit_scale=0.06"),
        ({"vision": {"hidden_size": 66, "num_attention_heads": 6}}, "hidden_size=66: .* multiple of 4"),
    ],
)  # fmt: skip
def test_bad_values_name_field_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"projector_layout": "original"},
        {"vision_feature_select_strategy": "patch"},
        {"delta_rank": "4"},
        {"use_emhsa": None},
    ],
    ids=str,
)
def test_other_types_are_refused_by_the_field(arguments):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(arguments))):
        tiny_config(**arguments)


def test_transformers_serve_finds_the_class_of_a_repo():
    names = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", None)
    assert names is None or names["delta_llava"] == "DeltaLlavaForConditionalGeneration"
