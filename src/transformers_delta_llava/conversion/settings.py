"""Builds transformers configs from the JSON of a checkpoint, and says what it did not understand."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from transformers import AutoConfig, PreTrainedConfig

from ..utils.errors import explain_errors
from ..utils.validation import FileModel, validate


# Settings that every transformers config has; none of them describes a model's weights or its computation.
_GENERIC = set(PreTrainedConfig().to_dict()) - {"model_type"}
# Older spellings that transformers' own configs still translate.
_TRANSLATED = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
_Layers = Annotated[int, Field(ge=1, le=1000)]
_Size = Annotated[int, Field(ge=1, lt=2**31)]


class _Sizes(FileModel):
    """Sizes by which configs and models build lists and tables, at most what any model has, by a wide margin."""

    num_hidden_layers: _Layers | None = None
    hidden_size: _Size | None = None
    intermediate_size: _Size | None = None
    num_attention_heads: _Size | None = None
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    max_position_embeddings: _Size | None = None
    vocab_size: _Size | None = None
    num_channels: _Size | None = None
    patch_size: _Size | None = None
    image_size: Annotated[int, Field(ge=1, le=2**16)] | None = None
    text_config: "_Sizes | None" = None
    vision_config: "_Sizes | None" = None


def check_sizes(settings: Mapping[str, object], where: str) -> None:
    """Refuse a config whose sizes would fill the memory before anything compares them with the weights.

    Raises:
        ConversionError: one sentence that begins with `where`.
    """
    validate(_Sizes, dict(settings), where)


def build_config(model_type: str, **values: object) -> tuple[PreTrainedConfig, list[str]]:
    """A config of `model_type` from those `values` that it knows, and the names of the others.

    Raises:
        ConversionError: on a value that transformers refuses.
    """
    check_sizes(values, f"A setting of the {model_type} config is not usable")
    known = (set(AutoConfig.for_model(model_type).to_dict()) - _GENERIC) | _TRANSLATED
    with explain_errors(f"A setting of the {model_type} config is not usable"):
        config = AutoConfig.for_model(model_type, **{name: values[name] for name in values.keys() & known})
    return config, sorted(values.keys() - known - _GENERIC)
