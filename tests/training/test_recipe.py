"""A recipe that cannot run is one sentence that names the key and what would do."""

from pathlib import Path

import pytest

from transformers_delta_llava.training import RecipeError, load_recipe


RECIPE = """
model: {path: org/model}
data: {path: DATA, chat_template: plain}
train: [projector]
visual_tokens: 144
arguments: {output_dir: out, learning_rate: 1e-3}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text("[]")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("DATA", str(tmp_path / "rows.json")))
    return file


def test_a_recipe_is_read(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.model.path == "org/model"
    assert recipe.budgets == (144,)
    assert recipe.arguments["learning_rate"] == 0.001  # YAML 1.1 takes 1e-3 for a string


def test_overrides_change_a_recipe(recipe_file: Path) -> None:
    overrides = ["visual_tokens=[36, 4]", "arguments.max_steps=3", "model.config.delta_rank=8", "data.on_error=skip"]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.budgets == (36, 4)
    assert recipe.arguments["max_steps"] == 3
    assert recipe.model.config == {"delta_rank": 8}
    assert recipe.data.on_error == "skip"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("visual_token=36", r"visual_token is no key of a recipe; did you mean visual_tokens"),
        ("data.img=x", r"data\.img is no key of a recipe"),
        ("model.pth=x", r"model\.pth is no key of a recipe; did you mean path"),
        ("arguments.learning_rat=1", r"arguments\.learning_rat is no training argument.*did you mean learning_rate"),
        ("arguments.output_dir=", r"arguments\.output_dir is missing: name the folder"),
        ("arguments.remove_unused_columns=true", r"remove_unused_columns=true would drop the images"),
        ("arguments=3", r"arguments=3: write key: value pairs"),
        ("data.path=none.json", r"data\.path=none\.json: there is no such file"),
        ("data.path=rows.csv", r"data\.path=rows\.csv: name a \.json or \.jsonl file"),
        ("data.images=./nowhere", r"data\.images=\./nowhere: there is no such folder"),
        ("data.chat_template=vicuna", r"data\.chat_template=vicuna: use one of vicuna_v1, llama_2"),
        ("data.on_error=ignore", r"data\.on_error='ignore': use one of fail, skip"),
        ("data.max_length=0", r"data\.max_length=0: use a whole number"),
        ("data.dataset=./x", r"data must have one of path .* and dataset"),
        ("model.path=./nowhere", r"model\.path=\./nowhere: there is no such folder"),
        ("model.vision=org/clip", r"model must have one of: path; vision and language"),
        ("model={vision: org/clip}", r"model\.language is missing: vision and language go together"),
        ("model={vision_config: {}, text_config: {}}", r"model\.tokenizer is missing"),
        ("model.dtype=int8", r"model\.dtype='int8': use one of auto, float32"),
        ("train=projector", r"train='projector': give a list of vision_tower, projector"),
        ("train=[projektor]", r"train='projektor': use one of vision_tower, projector"),
        ("train=[lora, language_model]", r"leave one of them out"),
        ("lora.r=8", r"lora is given but train does not name it"),
        ("visual_tokens=many", r"visual_tokens='many': give a number of tokens per image"),
        ("visual_tokens=[]", r"visual_tokens=\[\]: give a number"),
        ("visual_tokens=[36, true]", r"give a number of tokens per image"),
        ("visual_tokens", r"--set visual_tokens: write it as key=value"),
        ("train.x=1", r"--set train\.x=1: train holds a value"),
        ("visual_tokens=[36", r"visual_tokens is not YAML"),
    ],
)
def test_what_cannot_run_is_one_sentence(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe_file, [override])
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"There is no recipe .*none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match=r"list\.yaml holds no key: value pairs"):
        load_recipe(tmp_path / "list.yaml")


@pytest.mark.parametrize("key", ["model", "data", "train", "visual_tokens"])
def test_a_missing_section_is_named(recipe_file: Path, key: str) -> None:
    lines = [line for line in recipe_file.read_text().splitlines() if not line.startswith(key)]
    recipe_file.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=key):
        load_recipe(recipe_file)


def test_a_recipe_round_trips(recipe_file: Path, tmp_path: Path) -> None:
    from transformers_delta_llava.training.yaml_files import write_yaml

    recipe = load_recipe(recipe_file)
    write_yaml(recipe.to_dict(), tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe
