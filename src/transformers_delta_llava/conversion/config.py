"""Builds the config of a repo from a checkpoint's `config.json`, and lists the keys that it ignored or does not know."""

from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict
from transformers import AutoConfig, PreTrainedConfig

from ..modeling import DeltaLlavaConfig
from ..modeling.configuration_delta_llava import SELECT_STRATEGIES
from ..utils.errors import DeltaLlavaError, explain_errors, show
from ..utils.validation import check_sizes, validate
from .prompts import LanguageModel, find_language_model


# Settings that every transformers config has; none of them describes a model's weights or its computation.
_GENERIC = set(PreTrainedConfig().to_dict()) - {"model_type"}
# Older spellings that transformers' own configs still translate.
_TRANSLATED = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def build_config(model_type: str, **values: object) -> tuple[PreTrainedConfig, list[str]]:
    """A config of `model_type` from the `values` that it has a field for, and the names of the others.

    Raises:
        DeltaLlavaError: on a value that transformers refuses.
    """
    where = f"A setting of the {model_type} config is not usable"
    check_sizes(values, where)
    known = (set(AutoConfig.for_model(model_type).to_dict()) - _GENERIC) | _TRANSLATED
    with explain_errors(where):
        config = AutoConfig.for_model(model_type, **{name: values[name] for name in values.keys() & known})
    return config, sorted(values.keys() - known - _GENERIC)


# Vocabularies are padded to a multiple of this, as is usual on the Hub.
VOCABULARY_MULTIPLE = 64
# Prefix of config keys for settings that the released code fixes. Only checkpoints that this package exports have them.
EXTRA_PREFIX = "mm_"

# Keys that have no effect on the result, by the reason.
_REASONS = {
    "only the authors' training reads it": """
        freeze_backbone freeze_mm_mlp_adapter freeze_mm_vision_resampler mm_projector_lr mm_vision_tower_lr
        tune_mm_mlp_adapter tune_mm_vision_resampler unfreeze_mm_vision_tower""",
    "only images cut into tiles need it, which the released projector does not support": """
        image_crop_resolution image_grid_pinpoints image_split_resolution""",
    "every tensor keeps the dtype that it is stored in": "dtype torch_dtype",
    "a second name of hidden_act in older Gemma configs": "hidden_activation",
    "the released code builds one projector whatever this says": "mm_projector_type",
    "the released code has no resampler": "mm_resampler_type",
    "the token is never put into a prompt": "mm_use_im_patch_token",
    "generation needs padding on the left": "tokenizer_padding_side",
    "a Delta-LLaVA checkpoint always has a projector": "use_mm_proj",
    "a generation setting of transformers 4; those that count are in generation_config.json": """
        bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
        encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
        length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
        output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k
        top_p typical_p""",
    "transformers 4 wrote it into every config; none of these language models reads it": """
        add_cross_attention cross_attention_hidden_size finetuning_task is_decoder prefix pruned_heads sep_token_id
        task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torchscript use_bfloat16""",
    "how the model was run, not what it is": """
        _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled attn_implementation""",
}
IGNORED_KEYS = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}
# Settings that change what the model computes in ways this package does not follow: key -> supported values.
_REQUIRED_VALUES: dict[str, tuple] = {
    "mm_patch_merge_type": (None, "flat"),
    "mm_use_im_start_end": (None, False),
    "mm_vision_select_feature": (None, "patch"),
    "image_aspect_ratio": (None, "pad", "square"),
    "quantization_config": (None,),
    "s2": (None, False),
}


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("it must be a number, not true or false")
    return value


# A number that may also be written as text, as some tools do.
_Int = Annotated[int, BeforeValidator(_refuse_bool)]
_Float = Annotated[float, BeforeValidator(_refuse_bool)]


class SourceKeys(BaseModel):
    """The keys of a checkpoint's `config.json` that say what the model computes beyond its language model."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    image_aspect_ratio: str | None = None
    mm_hidden_size: _Int | None = None
    mm_vision_select_layer: _Int | None = None
    mm_vision_tower: str | None = None
    scale_factor: _Int | None = None
    tokenizer_model_max_length: _Int | None = None
    vocab_size: _Int | None = None

    # Extra keys: the released code fixes these settings.
    mm_projector_drop_path: _Float | None = None
    mm_projector_head_dim: _Int | None = None
    mm_projector_hidden_act: str | None = None
    mm_projector_mix_ratio: _Float | None = None
    mm_projector_mlp_ratio: _Float | None = None
    mm_projector_num_attention_heads: _Int | None = None
    mm_projector_sr_ratio: _Int | None = None
    mm_use_delta_projection: bool | None = None
    mm_use_emhsa: bool | None = None
    mm_use_transformer_block: bool | None = None
    mm_vision_feature_levels: list[_Int] | None = None

    @property
    def extras(self) -> dict[str, object]:
        """Settings of `DeltaLlavaConfig` that the extra keys give."""
        values = ((field, getattr(self, EXTRA_PREFIX + field)) for field in DEFAULTS)
        return {field: value for field, value in values if value is not None}


# What the released code fixes, as the defaults of our config have it.
DEFAULTS = {
    field: signature(DeltaLlavaConfig).parameters[field].default
    for name in SourceKeys.model_fields
    if (field := name.removeprefix(EXTRA_PREFIX)).startswith(("projector_", "use_", "vision_feature_"))
}


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the embeddings, and the ids of the two tokens that a released checkpoint lacks."""

    size: int
    image_token_id: int
    pad_token_id: int | None = None


@dataclass(frozen=True)
class SourceConfig:
    """`config.json` of a checkpoint, read once.

    Attributes:
        settings: the file's content.
        keys: the authors' own keys.
        language_model: what its `model_type` stands for.
        text_config: config of the language model, with the vocabulary that the file states.
        ignored: keys that have no effect on the result, with the reason.
        unknown: keys that this package does not know.
    """

    settings: dict
    keys: SourceKeys
    language_model: LanguageModel
    text_config: PreTrainedConfig
    ignored: dict[str, str]
    unknown: list[str]


def read_config(settings: dict) -> SourceConfig:
    """Check a checkpoint's `config.json`: the language model's settings, `scale_factor` and the `mm_*` keys.

    Raises:
        DeltaLlavaError: an unknown language model, a value of the wrong type, or a setting that asks for something the
            released projector does not do.
    """
    language_model = find_language_model(settings.get("model_type"))
    for key, allowed in _REQUIRED_VALUES.items():
        if settings.get(key) not in allowed:
            supported = " or ".join(repr(value) for value in allowed if value is not None) or "absent"
            raise DeltaLlavaError(
                f"config.json has {key}={show(settings[key])}, which is not supported; it must be {supported}."
            )
    keys = validate(SourceKeys, settings, "config.json")
    text_config, others = build_config(**{**deepcopy(settings), "model_type": language_model.text_model_type})
    known = SourceKeys.model_fields.keys() | IGNORED_KEYS.keys() | _REQUIRED_VALUES.keys()
    return SourceConfig(
        settings=settings,
        keys=keys,
        language_model=language_model,
        text_config=text_config,
        ignored={key: IGNORED_KEYS[key] for key in sorted(settings.keys() & IGNORED_KEYS)},
        unknown=[key for key in others if key not in known],
    )


def convert_config(
    config: dict | SourceConfig,
    vision_config: PreTrainedConfig,
    vocabulary: Vocabulary | None = None,
    *,
    scale_factor: int | None = None,
    delta_rank: int | None = None,
) -> DeltaLlavaConfig:
    """The config of a released checkpoint as a `DeltaLlavaConfig`.

    Args:
        config: what the checkpoint's `config.json` holds, or the result of `read_config`.
        vision_config: geometry of the vision tower.
        vocabulary: the vocabulary with its image token; by default that token is the first one after the
            language model's own.
        scale_factor: the one that the checkpoint was trained with, where `config` does not say.
        delta_rank: rank of the projector's updates; by default that of the released code, 16.

    Raises:
        DeltaLlavaError: a setting is missing, asks for something the released projector does not do, or disagrees with
            the vision tower.
        ValueError: from `DeltaLlavaConfig`, for instance where `scale_factor` does not divide the tower's grid.
    """
    source = config if isinstance(config, SourceConfig) else read_config(config)
    keys = source.keys
    _check_tower(keys, vision_config)
    vocabulary = vocabulary or _default_vocabulary(keys)
    text_config = deepcopy(source.text_config)
    text_config.vocab_size = vocabulary.size
    if vocabulary.pad_token_id is not None:
        text_config.pad_token_id = vocabulary.pad_token_id
    fields = {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_id": vocabulary.image_token_id,
        "vision_feature_select_strategy": SELECT_STRATEGIES.get(vision_config.model_type, "default"),
        "projector_layout": "released",
        **keys.extras,
    }
    if keys.mm_vision_select_layer is not None:
        fields["vision_feature_layer"] = keys.mm_vision_select_layer
    if delta_rank is not None:
        fields["delta_rank"] = delta_rank
    return DeltaLlavaConfig(**fields, scale_factor=_scale_factor(keys, scale_factor, fields))


def _scale_factor(keys: SourceKeys, given: int | None, fields: dict) -> int:
    """The scale factor of the config, or the `given` one where the config has none."""
    if keys.scale_factor is None:
        if given is not None:
            return given
        config = DeltaLlavaConfig(**deepcopy(fields), scale_factor=1)
        choices = [f"{config.scale_factor_for(tokens)} ({tokens})" for tokens in config.visual_token_budgets]
        raise DeltaLlavaError(
            "config.json has no scale_factor; pass `scale_factor=...`, the one that the checkpoint was trained with. "
            f"Possible values, with the visual tokens per image that they give: {', '.join(choices)}."
        )
    if given not in (None, keys.scale_factor):
        raise DeltaLlavaError(
            f"config.json has scale_factor={keys.scale_factor}, which differs from {given}; do not pass `scale_factor=...`, "
            "and choose another number of visual tokens at each call (num_visual_tokens)."
        )
    return keys.scale_factor


def padded_vocab_size(rows: int, needed: int) -> int:
    """Rows of the embeddings for `needed` token ids: `rows` where they suffice, else rounded up to `VOCABULARY_MULTIPLE`."""
    return rows if needed <= rows else -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _default_vocabulary(keys: SourceKeys) -> Vocabulary:
    rows = keys.vocab_size
    if rows is None:
        raise DeltaLlavaError("config.json has no vocab_size.")
    return Vocabulary(padded_vocab_size(rows, rows + 1), image_token_id=rows)


def _check_tower(keys: SourceKeys, vision_config: PreTrainedConfig) -> None:
    width, claimed = vision_config.hidden_size, keys.mm_hidden_size
    levels = keys.mm_vision_feature_levels or DEFAULTS["vision_feature_levels"]
    # Some training scripts write the width of one level, others that of all levels side by side.
    if claimed not in (None, width, width * len(levels)):
        raise DeltaLlavaError(
            f"config.json says mm_hidden_size={claimed}, but the vision tower is {width} wide; "
            "pass `vision_tower=...`, the tower that the checkpoint was trained with."
        )
