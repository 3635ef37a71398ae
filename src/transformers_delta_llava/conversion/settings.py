"""Builds transformers configs from the JSON of a checkpoint, and says what it did not understand."""

from transformers import AutoConfig, PreTrainedConfig

from ..utils.errors import explain_errors
from ..utils.validation import check_sizes


# Settings that every transformers config has; none of them describes a model's weights or its computation.
_GENERIC = set(PreTrainedConfig().to_dict()) - {"model_type"}
# Older spellings that transformers' own configs still translate.
_TRANSLATED = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


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
