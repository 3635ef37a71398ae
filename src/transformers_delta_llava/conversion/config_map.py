"""The `config.json` of the authors' checkpoints, key by key."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from ..modeling import DeltaLlavaConfig
from .errors import ConversionError
from .language_models import language_model
from .settings import build_config


# What the released code reads from hidden states 12, 16, 22 and 23 is fixed, whatever the config says.
RELEASED_LEVELS = (12, 16, 22, 23)
# Tables of embeddings are kept at a multiple of this, as is usual on the Hub.
VOCABULARY_MULTIPLE = 64

USED_KEYS = frozenset(
    {
        "image_aspect_ratio",
        "mm_hidden_size",
        "mm_patch_merge_type",
        "mm_use_im_start_end",
        "mm_vision_select_feature",
        "mm_vision_select_layer",
        "mm_vision_tower",
        "model_type",
        "scale_factor",
        "tokenizer_model_max_length",
    }
)
_TRAINING = "only the authors' training reads it"
_ANYRES = "only pictures cut into tiles need it, which the released projector does not support"
IGNORED_KEYS = {
    "freeze_backbone": _TRAINING,
    "freeze_mm_mlp_adapter": _TRAINING,
    "freeze_mm_vision_resampler": _TRAINING,
    "image_crop_resolution": _ANYRES,
    "image_grid_pinpoints": _ANYRES,
    "image_split_resolution": _ANYRES,
    "mm_projector_lr": _TRAINING,
    "mm_projector_type": "the released code builds one projector whatever this says",
    "mm_resampler_type": "the released code has no resampler",
    "mm_use_im_patch_token": "the token is never put into a prompt",
    "mm_vision_tower_lr": _TRAINING,
    "tokenizer_padding_side": "generation needs padding on the left",
    "tune_mm_mlp_adapter": _TRAINING,
    "tune_mm_vision_resampler": _TRAINING,
    "unfreeze_mm_vision_tower": _TRAINING,
    "use_mm_proj": "a Delta-LLaVA checkpoint always has a projector",
}
# Settings that change what the model computes in ways this package does not follow: key -> values that are fine.
_REQUIRED_VALUES: dict[str, tuple] = {
    "mm_patch_merge_type": (None, "flat"),
    "mm_use_im_start_end": (None, False),
    "mm_vision_select_feature": (None, "patch"),
    "image_aspect_ratio": (None, "pad", "square"),
    "quantization_config": (None,),
    "s2": (None, False),
}


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the embeddings, and the ids of the two tokens that a released checkpoint lacks."""

    size: int
    image_token_id: int
    pad_token_id: int | None = None


def convert_config(
    config: dict, vision_config: PreTrainedConfig, vocabulary: Vocabulary | None = None
) -> DeltaLlavaConfig:
    """The config of a released checkpoint as a `DeltaLlavaConfig`.

    Args:
        config: what the checkpoint's `config.json` holds: the language model's settings, `scale_factor` and `mm_*` keys.
        vision_config: geometry of the vision tower.
        vocabulary: the vocabulary with its image token; by default that token is the first one after the
            language model's own.

    Raises:
        ConversionError: a setting is missing, asks for something the released projector does not do, or disagrees with
            the vision tower.
        ValueError: from `DeltaLlavaConfig`, for instance where `scale_factor` does not divide the tower's grid.
    """
    family = language_model(config.get("model_type"))
    for key, allowed in _REQUIRED_VALUES.items():
        if config.get(key) not in allowed:
            fine = " or ".join(repr(value) for value in allowed if value is not None) or "absent"
            raise ConversionError(f"config.json has {key}={config[key]!r}, which is not supported; it must be {fine}.")
    if not isinstance(config.get("scale_factor"), int):
        raise ConversionError(
            "config.json has no scale_factor, so this is not a Delta-LLaVA checkpoint; if it is one, add the scale_factor "
            "it was trained with (2 for 144 visual tokens of a 24 x 24 grid)."
        )
    _check_tower(config, vision_config)
    vocabulary = vocabulary or _default_vocabulary(config)
    text_config, _ = build_config(**{**config, "model_type": family.text_model_type})
    text_config.vocab_size = vocabulary.size
    if vocabulary.pad_token_id is not None:
        text_config.pad_token_id = vocabulary.pad_token_id
    layer = config.get("mm_vision_select_layer")
    return DeltaLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=vocabulary.image_token_id,
        scale_factor=config["scale_factor"],
        vision_feature_layer=-2 if layer is None else layer,
        vision_feature_levels=list(RELEASED_LEVELS),
        vision_feature_select_strategy="full" if vision_config.model_type == "siglip_vision_model" else "default",
        projector_layout="released",
    )


def unused_keys(config: dict) -> tuple[dict[str, str], list[str]]:
    """Which keys of a checkpoint's config have no effect on the result.

    Returns:
        Those that are left out on purpose with their reasons, and those that are not known.
    """
    family = language_model(config.get("model_type"))
    _, unknown = build_config(**{**config, "model_type": family.text_model_type})
    ignored = {key: IGNORED_KEYS[key] for key in sorted(config.keys() & IGNORED_KEYS)}
    return ignored, [key for key in unknown if key not in USED_KEYS | IGNORED_KEYS.keys() | _REQUIRED_VALUES.keys()]


def grown_vocabulary(rows: int, needed: int) -> int:
    """Rows of the embeddings for ids up to `needed` - 1: unchanged where they suffice, else rounded up."""
    return rows if needed <= rows else -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _default_vocabulary(config: dict) -> Vocabulary:
    rows = config.get("vocab_size")
    if not isinstance(rows, int):
        raise ConversionError("config.json has no vocab_size.")
    return Vocabulary(grown_vocabulary(rows, rows + 1), image_token_id=rows)


def _check_tower(config: dict, vision_config: PreTrainedConfig) -> None:
    width, claimed = vision_config.hidden_size, config.get("mm_hidden_size")
    # Some training scripts write the width of one level, others that of all levels side by side.
    if claimed not in (None, width, width * len(RELEASED_LEVELS)):
        raise ConversionError(
            f"config.json says mm_hidden_size={claimed}, but the vision tower is {width} wide; "
            "give the tower that the checkpoint was trained with (--vision-tower)."
        )
