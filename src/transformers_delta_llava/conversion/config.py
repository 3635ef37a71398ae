"""Configs: a released checkpoint's `config.json`, its vision tower's, and the repo's, which is made of both."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ..errors import DeltaLlavaError, read_json
from ..modeling import DeltaLlavaConfig
from ..modeling.configuration_delta_llava import DEFAULT_VISION_CONFIG, SELECT_STRATEGIES
from .prompts import LanguageModel, find_language_model


# Settings that every transformers config has; none of them describes a model's weights or its computation.
_GENERIC = set(PreTrainedConfig().to_dict()) - {"model_type"}
# Older spellings that transformers' own configs still translate.
_TRANSLATED = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
# What the released code fixes and `DeltaLlavaConfig` leaves open, with the released values. Checkpoints that this package
# exports have these settings in their config.json, with the prefix.
DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in signature(DeltaLlavaConfig).parameters.items()
    if name.startswith(("projector_", "use_", "vision_feature_levels")) and name != "projector_layout"
}
EXTRA_PREFIX = "mm_"

# Keys of released checkpoints that are read here, in the tokenizer or in the tower.
_READ_KEYS = {
    *("model_type", "scale_factor", "vocab_size", "image_aspect_ratio", "tokenizer_model_max_length", "_name_or_path"),
    "image_grid_pinpoints",
    *("mm_hidden_size", "mm_vision_select_layer", "mm_vision_tower"),
    *(EXTRA_PREFIX + name for name in DEFAULTS),
}
# Keys without effect on the result: of training, second names, what
# the released code does not look at, generation settings and defaults that transformers 4 wrote into every config, and how
# the model was run.
_IGNORED = """
    freeze_backbone freeze_mm_mlp_adapter freeze_mm_vision_resampler mm_projector_lr mm_vision_tower_lr
    tune_mm_mlp_adapter tune_mm_vision_resampler unfreeze_mm_vision_tower tokenizer_padding_side
    image_crop_resolution image_split_resolution
    dtype torch_dtype hidden_activation
    mm_projector_type mm_resampler_type mm_use_im_patch_token use_mm_proj
    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    add_cross_attention cross_attention_hidden_size finetuning_task is_decoder prefix pruned_heads sep_token_id
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torchscript use_bfloat16
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled attn_implementation
"""
# Settings that change what the model computes in ways this package does not follow: key -> supported values.
_REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "mm_patch_merge_type": (None, "flat"),
    "mm_use_im_start_end": (None, False),
    "mm_vision_select_feature": (None, "patch"),
    "image_aspect_ratio": (None, "pad", "square", "anyres"),
    "quantization_config": (None,),
    "s2": (None, False),
}

# Towers that checkpoints name, so that one that holds its tower's weights converts without a download.
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": DEFAULT_VISION_CONFIG,
    "openai/clip-vit-large-patch14": {**DEFAULT_VISION_CONFIG, "image_size": 224},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    },
}


@dataclass(frozen=True)
class TowerFamily:
    """What conversion knows of a kind of vision tower.

    Attributes:
        mean, std: of its pixel values.
        whole: model type of the image-text model around it.
        crops: whether its image processor resizes the shortest edge and crops, or squashes the image.
    """

    mean: list[float]
    std: list[float]
    whole: str | None = None
    crops: bool = True


# The towers of `SELECT_STRATEGIES`. DINOv2's own image processor, BitImageProcessor, does the same as CLIP's.
TOWERS = {
    "clip_vision_model": TowerFamily(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, "clip"),
    "siglip_vision_model": TowerFamily(IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, "siglip", crops=False),
    "dinov2": TowerFamily(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_with_registers": TowerFamily(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


def build_config(model_type: str, **values: Any) -> tuple[PreTrainedConfig, list[str]]:
    """A config of `model_type` from the `values` that it has a field for, and the names of the others."""
    known = (set(AutoConfig.for_model(model_type).to_dict()) - _GENERIC) | _TRANSLATED
    config = AutoConfig.for_model(model_type, **{name: values[name] for name in values.keys() & known})
    return config, sorted(values.keys() - known - _GENERIC)


@dataclass(frozen=True)
class SourceConfig:
    """`config.json` of a checkpoint.

    Attributes:
        settings: the file's content.
        language_model: what its `model_type` stands for.
        text_config: config of the language model, with the vocabulary that the file states.
        unknown: keys that this package does not know.
    """

    settings: dict[str, Any]
    language_model: LanguageModel
    text_config: PreTrainedConfig
    unknown: list[str]


def read_config(settings: dict[str, Any]) -> SourceConfig:
    """Check a checkpoint's `config.json`.

    Raises:
        DeltaLlavaError: an unknown language model, or a setting that asks for something the released projector does not do.
    """
    language_model = find_language_model(settings.get("model_type"))
    for key, allowed in _REQUIRED_VALUES.items():
        if settings.get(key) not in allowed:
            supported = " or ".join(repr(value) for value in allowed if value is not None) or "absent"
            raise DeltaLlavaError(
                f"config.json has {key}={settings[key]!r}, which is not supported; it must be {supported}"
            )
    text_config, others = build_config(**{**deepcopy(settings), "model_type": language_model.text_model_type})
    known = {*_READ_KEYS, *_IGNORED.split(), *_REQUIRED_VALUES}
    return SourceConfig(settings, language_model, text_config, [key for key in others if key not in known])


def convert_config(
    source: SourceConfig,
    vision_config: PreTrainedConfig,
    *,
    vocab_size: int,
    image_token_id: int,
    video_token_id: int | None = None,
    pad_token_id: int | None = None,
    scale_factor: int | None = None,
    delta_rank: int | None = None,
) -> DeltaLlavaConfig:
    """The config of a released checkpoint as a `DeltaLlavaConfig`.

    Args:
        source: the checkpoint's `config.json`.
        vision_config: geometry of the vision tower.
        vocab_size: rows of the embeddings, those for new tokens included.
        image_token_id, video_token_id: which a released checkpoint lacks.
        pad_token_id: of the tokenizer; by default what `source` says.
        scale_factor: the one that the checkpoint was trained with, where `source` does not say.
        delta_rank: rank of the projector's updates; by default that of the released code, 16.

    Raises:
        DeltaLlavaError: there is no scale factor, or there are two.
        ValueError: from `DeltaLlavaConfig`, for instance where the scale factor does not divide the tower's grid.
    """
    settings = source.settings
    stated = settings.get("scale_factor")
    if stated is None and scale_factor is None:
        raise DeltaLlavaError(
            "config.json has no scale_factor; pass the one that the checkpoint was trained with (2 gives 144 of 576 tokens)"
        )
    if stated is not None and scale_factor not in (None, stated):
        raise DeltaLlavaError(
            f"config.json has scale_factor={stated}, not {scale_factor}; choose another number of visual tokens at each call "
            "(num_visual_tokens)"
        )
    text_config = deepcopy(source.text_config)
    text_config.vocab_size = vocab_size
    if pad_token_id is not None:
        text_config.pad_token_id = pad_token_id
    extras = {name: settings.get(EXTRA_PREFIX + name) for name in DEFAULTS}
    extras |= {"vision_feature_layer": settings.get("mm_vision_select_layer"), "delta_rank": delta_rank}
    return DeltaLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        scale_factor=scale_factor if stated is None else stated,
        vision_feature_select_strategy=SELECT_STRATEGIES.get(vision_config.model_type, "default"),
        projector_layout="released",
        **{name: value for name, value in extras.items() if value is not None},
    )


def processor_settings(source: SourceConfig, config: DeltaLlavaConfig) -> dict[str, Any]:
    """How the authors' code pads or tiles images, as arguments of `DeltaLlavaProcessor`."""
    ratio = source.settings.get("image_aspect_ratio")
    if ratio != "anyres":
        return {"do_pad": ratio == "pad"}
    grids = [[height, width] for width, height in source.settings["image_grid_pinpoints"]]
    tiles = max(height * width for height, width in grids) // config.vision_config.image_size**2
    return {"do_pad": False, "image_grid_pinpoints": grids, "max_tiles": tiles, "max_tiles_limit": max(tiles, 16)}


def read_tower_config(folder: Path) -> PreTrainedConfig:
    """The config of the vision tower in `folder`, which may hold a whole CLIP or SigLIP.

    Raises:
        DeltaLlavaError: it is a tower of an unsupported kind.
        OSError: there is no config.json.
    """
    values = read_json(folder / "config.json")
    model_type = values.get("model_type")
    whole = {family.whole: tower for tower, family in TOWERS.items() if family.whole is not None}
    if model_type in whole:
        values, model_type = values.get("vision_config", {}), whole[model_type]
    if model_type not in TOWERS:
        known = ", ".join([*whole, *TOWERS])
        raise DeltaLlavaError(f"the vision tower {folder.name} has model_type={model_type!r}; choose one of {known}")
    return build_config(**{**values, "model_type": model_type})[0]


def adapt_to_weights(config: PreTrainedConfig, names: Collection[str]) -> None:
    """SigLIP's pooling head is optional: no visual token reads it, and some checkpoints drop it."""
    if config.model_type == "siglip_vision_model" and names:
        config.vision_use_head = any(name.startswith("head.") for name in names)


def image_processor_settings(config: PreTrainedConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing of a tower's family, with what the tower's `own` preprocessor_config.json says differently.

    Raises:
        DeltaLlavaError: `own` makes images of another size than the tower reads.
    """
    side = {"height": config.image_size, "width": config.image_size}
    settings: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    family = TOWERS[config.model_type]
    settings |= {"image_mean": list(family.mean), "image_std": list(family.std)}
    if family.crops:
        settings |= {"image_processor_type": "CLIPImageProcessor", "crop_size": side, "do_center_crop": True}
        settings["size"] = {"shortest_edge": config.image_size}
    else:
        settings |= {"image_processor_type": "SiglipImageProcessor", "size": side}
    for name in settings.keys() & own.keys() - {"image_processor_type"}:
        if name not in ("size", "crop_size"):
            settings[name] = own[name]
            continue
        sides = own[name].values() if isinstance(own[name], dict) else [own[name]]
        if any(side != config.image_size for side in sides):
            raise DeltaLlavaError(
                f"the vision tower disagrees with itself: config.json says image_size={config.image_size}, "
                f"preprocessor_config.json {name}={own[name]}"
            )
    return settings
