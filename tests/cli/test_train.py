"""`delta-llava train`: the path on stdout, one sentence and exit code 2 where a recipe does not work."""

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
    ("change", "message"),
    [
        (
            "num_visual_token=1",
            "delta-llava train: recipe.yaml: num_visual_token is not a key of a recipe; did you mean num_visual_tokens.",
        ),
        ("data.path=none.json", "delta-llava train: recipe.yaml: data.path: there is no file 'none.json'."),
        ("arguments.lr=1", "delta-llava train: recipe.yaml: arguments: lr is not an argument of TrainingArguments."),
    ],
)
def test_a_bad_recipe_is_one_sentence(call: Any, recipe: Path, change: str, message: str) -> None:
    code, _, err = call("train", recipe, "--set", change)
    assert code == 2 and err.strip().splitlines() == [message]
