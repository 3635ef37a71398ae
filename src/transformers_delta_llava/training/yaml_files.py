"""YAML as people write it."""

import re
from pathlib import Path
from typing import Any

from .errors import RecipeError


def _loader() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise RecipeError("Recipes need PyYAML: pip install 'transformers-delta-llava[train]'.") from error

    class Loader(yaml.SafeLoader):
        """YAML 1.1, but for `1e-3`, which is a number to everyone else."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    return Loader


def _parse(text: str, name: str) -> Any:
    loader = _loader()
    import yaml

    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {' '.join(str(error).split())}.") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The key: value pairs of a YAML file.

    Raises:
        RecipeError: the file is missing, or holds something else.
    """
    if not Path(path).is_file():
        raise RecipeError(f"There is no recipe {path}.")
    content = _parse(Path(path).read_text(encoding="utf-8"), str(path))
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no key: value pairs.")
    return content


def parse_value(text: str, name: str) -> Any:
    """A YAML value given on a command line."""
    return _parse(text, name)


def write_yaml(content: dict[str, Any], path: Path) -> None:
    """Write key: value pairs in their order."""
    import yaml

    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
