"""Models and data that all training tests share, and no test changes."""

from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import write_data, write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any) -> Path:
    """A model, the same with a tied head, and 16 rows, of which every fourth has no image."""
    folder = tmp_path_factory.mktemp("training")
    write_model(folder / "model", projector_drop_path=0.0)
    write_model(folder / "tied", projector_drop_path=0.0, tie_word_embeddings=True)
    write_data(folder / "data", 16)
    return folder
