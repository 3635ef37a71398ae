"""Repos, delta repos and checkpoints for the tests of deltas."""

from pathlib import Path

import pytest

from examples.make_checkpoint import write_checkpoint
from tests.modeling.delta_cases import LAYOUTS, make
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


@pytest.fixture(params=LAYOUTS, ids=str)
def model(request) -> DeltaLlavaForConditionalGeneration:
    return make(**LAYOUTS[request.param])


@pytest.fixture
def repo(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture(scope="session")
def released_repo(tmp_path_factory) -> Path:
    """A repo in the released layout, and beside it `deltas` and `other-deltas` (of another base). Only to be read."""
    folder = tmp_path_factory.mktemp("released")
    released = make()
    released.save_pretrained(folder / "repo", max_shard_size="300KB")
    (folder / "repo" / "README.md").write_text("# A card\n")
    released.load_delta_state_dict({name: t * 2 for name, t in released.delta_state_dict().items()})
    released.save_deltas(folder / "deltas")
    make(seed=1).save_deltas(folder / "other-deltas")
    return folder / "repo"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint in the authors' layout. Only to be read."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llava-tiny"
    write_checkpoint(folder)
    return folder
