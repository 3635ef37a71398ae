"""What comes from outside, as models of pydantic."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

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
