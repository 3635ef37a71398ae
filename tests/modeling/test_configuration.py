import json

import pytest
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

from tests.tiny import TEXT, VISION, tiny_config
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaModel


PAPER = {"projector_layout": "paper"}
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
    config = tiny_config(
        scale_factor=4, projector_layout="paper", delta_sharing="all", delta_rank=3, projector_drop_path=0.0
    )
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
    config = DeltaLlavaConfig(vision, text, image_token_id=1, vision_feature_levels=[1])
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

    def test_it_agrees_with_the_scale_factor_or_is_refused(self, name, tmp_path):
        assert tiny_config(**{name: 9}, scale_factor=4).scale_factor == 4
        with pytest.raises(ValueError, match=f"{name}=99 disagrees with scale_factor=2, which gives 36 tokens; leave"):
            tiny_config(**{name: 99}, scale_factor=2)

    @pytest.mark.parametrize("number", [99, 36.0, True, "36", [36]])
    def test_what_the_grid_cannot_give_is_refused(self, name, number, tmp_path):
        tiny_config().save_pretrained(tmp_path)
        match = "this model cannot give it; use one of 144, 36, 16, 9, 4, 1"
        with pytest.raises(ValueError, match=match):
            tiny_config(**{name: number})
        with pytest.raises(ValueError, match=match):
            DeltaLlavaConfig.from_pretrained(tmp_path, **{name: number})


def test_a_model_is_loaded_with_another_number_of_visual_tokens(tmp_path):
    DeltaLlavaModel(tiny_config()).save_pretrained(tmp_path)
    assert DeltaLlavaModel.from_pretrained(tmp_path, num_visual_tokens=9).config.scale_factor == 4


def test_unknown_budget_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"num_visual_tokens=37: .*; use one of 144, 36, 16, 9, 4, 1\."):
        tiny_config().scale_factor_for(37)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scale_factor": 5}, r"scale_factor=5: .*12 x 12 patch grid; use one of 1, 2, 3, 4, 6, 12\."),
        ({"scale_factor": 0}, "scale_factor=0: .* use one of 1, 2"),
        ({"scale_factor": 2.0}, "scale_factor=2.0: .* use one of 1, 2"),
        ({"vision": {"image_size": 25, "patch_size": 30}}, "vision_config.image_size=25: .* one patch of 30 pixels"),
        ({"vision": {"image_size": [24, 12]}}, r"vision_config.image_size=\[24, 12\]: .* square"),
        ({"vision": {"model_type": "siglip_vision_model"}}, "'default': a siglip_vision_model has no class.* use 'full'"),
        ({"vision_feature_select_strategy": "full"}, "strategy='full': .* starts with a class token; use 'default'"),
        ({"vision_feature_select_strategy": "patch"}, "strategy='patch': use one of 'default', 'full'"),
        ({"vision_feature_layer": 5}, "vision_feature_layer=5: the tower has 5 hidden states .*; use -5 to 4"),
        ({"vision_feature_levels": [1, -6]}, r"vision_feature_levels=\[1, -6\]: .* use -5 to 4"),
        ({"vision_feature_levels": [1, "2"]}, "vision_feature_levels=.*'2'.*: .* use -5 to 4"),
        ({"vision_feature_levels": []}, r"vision_feature_levels=\[\]: name at least one"),
        ({"delta_rank": 0}, "delta_rank=0: use an integer of at least 1"),
        ({"delta_rank": 65}, "delta_rank=65: .* at most the tower's width, 64"),
        ({"projector_layout": "original"}, "projector_layout='original': use one of 'released', 'paper'"),
        ({"projector_num_attention_heads": 5}, "projector_num_attention_heads=5: .* 64; use one of 1, 2, 4, 8"),
        ({"projector_head_dim": 24}, "projector_head_dim=24: .* width, 64, .*; use one of 1, 2, 4, 8, 16, 32"),
        ({"projector_head_dim": 64}, "projector_head_dim=64: .* at least 2 head"),
        ({"projector_mix_ratio": 1.0}, "projector_mix_ratio=1.0: use a share between 0 and 1"),
        ({"projector_mlp_ratio": 0}, "projector_mlp_ratio=0: use a positive number"),
        ({"projector_sr_ratio": 0}, "projector_sr_ratio=0: use an integer of at least 1"),
        ({"projector_drop_path": 1.0}, "projector_drop_path=1.0: use a rate from 0"),
        ({"projector_hidden_act": "gelo"}, "projector_hidden_act='gelo': use a key"),
        ({"projector_window_size": 2}, "projector_window_size=2: .* use projector_layout='paper'"),
        ({**PAPER, "projector_window_size": 5}, "projector_window_size=5: .* use one of 1, 2, 3, 4, 6, 12"),
        ({**PAPER, "projector_window_size": 2, "scale_factor": 12}, "scale_factor=12: .* 2 x 2 queries; use one of 1, 2, 3, 6"),
        ({"delta_sharing": "all"}, "delta_sharing='all': the 'released' layout shares no base"),
        ({"delta_sharing": "none"}, "delta_sharing='none': use one of 'levels', 'all'"),
        ({"use_emhsa": None}, "use_emhsa=None: use one of True, False"),
        ({"text": {"vocab_size": 99}}, "image_token_id=99: use an id in the vocabulary, 0 to 98"),
        ({"text": {"model_type": "cohere", "logit_scale": 0.06}}, "text_config.logit_scale=0.06: .* not supported"),
        ({"vision": {"hidden_size": 66, "num_attention_heads": 6}}, "hidden_size=66: .* multiple of 4"),
    ],
)  # fmt: skip
def test_bad_values_name_field_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**arguments)
