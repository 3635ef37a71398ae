"""JSON objects in files."""

import json
from pathlib import Path

from .errors import ConversionError


def read_json(path: Path) -> dict:
    """The JSON object in `path`; ConversionError where it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path.name} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path.name} should hold a JSON object, but holds a {type(value).__name__}.")
    return value


def write_json(value: dict, path: Path) -> None:
    """Write `value` in the same bytes every time."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
