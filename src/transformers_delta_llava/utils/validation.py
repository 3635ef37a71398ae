"""What comes from outside, as models of pydantic."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedConfig

from .errors import DeltaLlavaError, one_line
from .files import read_json


class FileModel(BaseModel):
    """Base of models for files: values keep their JSON type (`"2"` is not 2, true is not 1), unknown keys are left out."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


Model = TypeVar("Model", bound=BaseModel)


def validate(
    model: type[Model], values: Any, where: str, error_type: type[DeltaLlavaError] = DeltaLlavaError
) -> Model:
    """`values` as a `model`.

    Raises:
        DeltaLlavaError: or `error_type`: one sentence that begins with `where`, such as the name of a file.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise error_type(f"{where}: {one_line(error)}.") from error


def read_model(path: Path, model: type[Model]) -> Model:
    """The JSON object in the file `path` as a `model`.

    Raises:
        DeltaLlavaError: no JSON object, or one that does not fit.
        OSError: the file cannot be read.
    """
    values: Mapping[str, Any] = read_json(path)
    return validate(model, values, path.name)


DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of this name.

    Raises:
        DeltaLlavaError: the name is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise DeltaLlavaError(f"dtype={name!r}: use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


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
        DeltaLlavaError: one sentence that begins with `where`.
    """
    validate(_Sizes, dict(settings), where)


def check_config(model: str) -> None:
    """`check_sizes` of the config.json of `model`, a folder or a Hub id, before transformers builds anything of it.

    Raises:
        DeltaLlavaError: as `check_sizes`.
        OSError: there is no such file.
    """
    check_sizes(PreTrainedConfig.get_config_dict(model)[0], f"config.json of {model}")
