"""config.json of a released checkpoint, key by key."""

from copy import deepcopy

import pytest
from transformers import CLIPVisionConfig, SiglipVisionConfig

from examples.make_checkpoint import LLAVA_KEYS, TEXT, TEXT_TYPES, TOWER
from transformers_delta_llava.conversion.config import convert_config, read_config
from transformers_delta_llava.conversion.prompts import LANGUAGE_MODELS
from transformers_delta_llava.conversion.tokenizer import padded_vocab_size
from transformers_delta_llava.errors import DeltaLlavaError


CONFIG = {**TEXT, **LLAVA_KEYS, "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
VISION = CLIPVisionConfig(**TOWER)


def convert(settings, vision=VISION, vocab_size=384, image_token_id=320, **options):
    return convert_config(
        read_config(settings), vision, vocab_size=vocab_size, image_token_id=image_token_id, **options
    )


def test_a_released_config():
    config = convert({**CONFIG, "scale_factor": 4, "rms_norm_eps": 1e-5, "rope_theta": 5000.0}, VISION)
    assert (config.scale_factor, config.num_visual_tokens, config.projector_layout) == (4, 4, "released")
    assert config.vision_feature_layer == -2
    assert config.vision_feature_levels == [12, 16, 22, 23]
    assert config.vision_feature_select_strategy == "default"
    assert config.text_config.model_type == "llama"
    assert config.text_config.rms_norm_eps == 1e-5
    assert config.text_config.rope_parameters["rope_theta"] == 5000.0
    assert config.text_config.num_key_value_heads == 2
    assert config.vision_config.image_size == 32
    assert (config.image_token_id, config.text_config.vocab_size) == (320, 384)
    assert not hasattr(config.text_config, "mm_vision_tower")


def test_a_given_vocabulary():
    config = convert(CONFIG, vocab_size=320, image_token_id=300, pad_token_id=301)
    assert (config.image_token_id, config.text_config.vocab_size, config.text_config.pad_token_id) == (300, 320, 301)


@pytest.mark.parametrize(("rows", "needed", "size"), [(320, 320, 320), (320, 100, 320), (320, 321, 384), (63, 64, 64)])
def test_tables_grow_only_where_needed(rows, needed, size):
    assert padded_vocab_size(rows, needed) == size


def test_a_siglip_tower_has_no_class_token():
    config = convert(CONFIG, SiglipVisionConfig(**TOWER))
    assert config.vision_feature_select_strategy == "full"


SHALLOW = {**TOWER, "num_hidden_layers": 3}
LEVELS = {"mm_vision_feature_levels": [1, 2, 3], "mm_vision_select_layer": -1}


@pytest.mark.parametrize(
    ("keys", "tower", "expected"),
    [
        ({"mm_vision_select_layer": -4}, TOWER, {"vision_feature_layer": -4}),
        ({"mm_vision_select_layer": None}, TOWER, {"vision_feature_layer": -2}),
        ({"mm_hidden_size": None}, TOWER, {}),
        (LEVELS, SHALLOW, {"vision_feature_levels": [1, 2, 3]}),
        (
            {"mm_projector_head_dim": 16, "mm_projector_mix_ratio": 0.5, "mm_use_emhsa": False},
            TOWER,
            {"projector_head_dim": 16, "projector_mix_ratio": 0.5, "use_emhsa": False},
        ),
    ],
)
def test_keys_that_are_read(keys, tower, expected):
    config = convert({**CONFIG, **keys}, CLIPVisionConfig(**tower), delta_rank=4)
    assert {field: getattr(config, field) for field in expected} == expected
    assert (config.delta_rank, read_config({**CONFIG, **keys}).unknown) == (4, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_opt"}, "model_type='llava_opt'.*llava_llama, llava_mistral"),
        ({"model_type": None}, "model_type=None"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch'.*must be 'patch'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type='spatial_unpad'.*'flat'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio='highres'.*'pad'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*must be absent"),
        ({"s2": True}, "s2=True"),
        ({"scale_factor": 3}, "scale_factor=3"),
        ({"mm_vision_feature_levels": [12, 60]}, "vision_feature_levels"),
    ],
)
def test_settings_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        convert({**CONFIG, **change})


def test_a_scale_factor_that_the_config_lacks():
    without = {key: value for key, value in CONFIG.items() if key != "scale_factor"}
    assert convert(without, scale_factor=4).scale_factor == 4
    assert convert(CONFIG, scale_factor=2).scale_factor == 2
    with pytest.raises(DeltaLlavaError, match="has scale_factor=2, not 4"):
        convert(CONFIG, scale_factor=4)
    with pytest.raises(DeltaLlavaError, match="has no scale_factor"):
        convert(without)


def test_unknown_keys_are_reported():
    config = read_config({**CONFIG, "mm_new_thing": 1, "auto_map": {"AutoConfig": "evil.Config"}})
    assert config.unknown == ["auto_map", "mm_new_thing"]


# What `PreTrainedConfig.to_dict` of transformers 4.57.6 writes for every model, in addition to the model's own settings.
TRANSFORMERS_4 = """
_name_or_path add_cross_attention architectures bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores
pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
_attn_implementation_autoset
"""


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_every_language_model(model_type):
    settings = {**dict.fromkeys(TRANSFORMERS_4.split()), **CONFIG, "model_type": model_type}
    assert set(read_config(settings).unknown) <= TEXT.keys()  # the sizes of the tests' models are those of Llama
    config = convert({**CONFIG, "model_type": model_type})
    assert config.text_config.model_type == TEXT_TYPES[model_type]
    assert config.text_config.hidden_size == TEXT["hidden_size"]
    assert config.tie_word_embeddings is (model_type == "llava_gemma")


def test_reading_leaves_the_settings_unchanged():
    settings = {**CONFIG, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    before = deepcopy(settings)
    source = read_config(settings)
    first = convert_config(source, VISION, vocab_size=384, image_token_id=320)
    second = convert_config(source, VISION, vocab_size=320, image_token_id=300)
    assert settings == before
    assert (first.text_config.vocab_size, second.text_config.vocab_size) == (384, 320)
