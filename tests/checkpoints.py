"""Checkpoints that the tests of the conversion start from."""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from examples.make_checkpoint import Tensors, write_checkpoint
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.conversion.weights import read_checkpoint
from transformers_delta_llava.errors import write_json


# A vision tower of four layers, for tests to which the released levels (12, 16, 22, 23) do not matter: half the time.
SHALLOW: dict[str, Any] = {
    "tower_sizes": {"num_hidden_layers": 4},
    "config": {"mm_vision_feature_levels": [1, 2, 3, 3]},
}


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a checkpoint, a repo or a vision tower, in memory."""
    return {name: tensor.load() for name, tensor in read_checkpoint(folder).tensors.items()}


def edit_json(path: Path, **keys: object) -> None:
    """Set keys of a JSON file; None deletes one."""
    content = {**json.loads(path.read_text()), **keys}
    write_json({key: value for key, value in content.items() if value is not None or key not in keys}, path)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete checkpoint, `llava-tiny`, and its `vision-tower`. Only to be read."""
    folder = tmp_path_factory.mktemp("pristine")
    write_checkpoint(folder / "llava-tiny", **SHALLOW)
    return folder


@pytest.fixture(scope="session")
def repo(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What that checkpoint is converted to. Only to be read."""
    output = tmp_path_factory.mktemp("converted") / "delta-llava-tiny"
    convert_checkpoint(pristine / "llava-tiny", output)
    return output


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """The checkpoint for a test that changes it; it still names the pristine vision tower."""
    return shutil.copytree(pristine / "llava-tiny", tmp_path / "llava-tiny")


@pytest.fixture
def edit_config(source: Path) -> Callable[..., None]:
    """Sets keys of the source's config.json; None deletes one."""

    return partial(edit_json, source / "config.json")
