"""`delta-llava train`: the path on stdout, one line and exit code 2 where a recipe does not work."""

from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import recipe_content, write_data, write_model
from transformers_delta_llava.training.recipe import write_yaml


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_data(tmp_path / "data", 4)
    write_yaml(recipe_content(tmp_path, model={"path": "org/model"}), tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def test_the_folder_is_printed(call: Any, recipe: Path) -> None:
    write_model(recipe.parent / "model")
    change = ["--set", f"model.path={recipe.parent / 'model'}", "--set", "arguments.max_steps=1"]
    code, out, _ = call("train", recipe, *change)
    assert code == 0 and out.splitlines()[-1] == str(recipe.parent / "out")
    assert (recipe.parent / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "key"),
    [("num_visual_token=1", "num_visual_token"), ("data.path=none.json", "none.json"), ("arguments.lr=1", "lr")],
)
def test_a_bad_recipe_is_one_line(call: Any, recipe: Path, change: str, key: str) -> None:
    write_model(recipe.parent / "model")
    code, _, err = call("train", recipe, "--set", f"model.path={recipe.parent / 'model'}", "--set", change)
    last = err.strip().splitlines()[-1]
    assert code in (1, 2) and last.startswith("delta-llava train: ") and key in last and "Traceback" not in err
