"""A recipe that cannot run is one sentence that names the key and what would do."""

from pathlib import Path

import pytest

from transformers_delta_llava.training import RecipeError, load_recipe
from transformers_delta_llava.training.arguments import make_arguments
from transformers_delta_llava.training.recipe import write_yaml


RECIPE = """
model: {path: org/model}
data: {path: DATA, chat_template: plain}
train: [projector]
num_visual_tokens: 144
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
    overrides = [
        "num_visual_tokens=[36, 4]",
        "arguments.max_steps=3",
        "model.config.delta_rank=8",
        "data.on_error=skip",
    ]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.budgets == (36, 4)
    assert recipe.arguments["max_steps"] == 3
    assert recipe.model.config == {"delta_rank": 8}
    assert recipe.data.on_error == "skip"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_visual_token=36", r"num_visual_token is not a key of a recipe; did you mean num_visual_tokens"),
        ("data.img=x", r"data: img is not a key of a recipe; did you mean images"),
        ("model.pth=x", r"model: pth is not a key of a recipe; did you mean path"),
        (
            "arguments.learning_rat=1",
            r"learning_rat is not an argument of TrainingArguments; did you mean learning_rate",
        ),
        ("arguments.output_dir=", r"arguments: output_dir is missing: name the folder"),
        ("arguments.remove_unused_columns=true", r"remove_unused_columns=True: it would drop the images"),
        ("arguments=3", r"arguments=3: input should be a valid dictionary"),
        ("arguments.learning_rate=abc", r"arguments: learning_rate='abc': input should be a valid number"),
        ("arguments.learning_rate=-1", r"learning_rate=-1: input should be greater than or equal to 0"),
        ("arguments.learning_rate=.nan", r"arguments\.learning_rate is not YAML .*: a number in it is out of range"),
        ("arguments.learning_rate=.inf", r"learning_rate=inf: input should be a finite number"),
        ("arguments.max_steps=[1]", r"max_steps=\[1\]: input should be a valid integer"),
        ("arguments.max_steps=99999999999999999999", r"a number in it is out of range"),
        ("arguments.per_device_train_batch_size=0", r"input should be greater than or equal to 1"),
        ("arguments.eval_strategy=steps", r"eval_strategy=steps: a recipe has no evaluation data"),
        ("arguments.eval_on_start=true", r"eval_on_start=True: a recipe has no evaluation data"),
        ("arguments.load_best_model_at_end=true", r"load_best_model_at_end=True: a recipe has no evaluation data"),
        ("arguments.save_strategy=best", r"save_strategy=best: use one of these \(no, steps, epoch\)"),
        ("arguments.push_to_hub=true", r"push_to_hub=True: publish the finished folder with `delta-llava push`"),
        ("data.path=none.json", r"data\.path: there is no file 'none\.json'"),
        ("data.path=RECIPE", r"data: path=.*: name a \.json or \.jsonl file"),
        ("data.images=./nowhere", r"data\.images: there is no folder '\./nowhere'"),
        ("data.chat_template=vicuna", r"data: chat_template=vicuna: use one of vicuna_v1, llama_2"),
        ("data.on_error=ignore", r"data\.on_error='ignore': input should be 'fail' or 'skip'"),
        ("data.max_length=0", r"data\.max_length=0: input should be greater than or equal to 1"),
        ("data.dataset=org/data", r"data: give one of: path .*; dataset"),
        ("model.path=./nowhere", r"model\.path: there is no folder '\./nowhere'"),
        ("model.path=[1]", r"model\.path=\[1\]: input should be a valid string"),
        ("model.vision=org/clip", r"model: give one of: path; vision and language"),
        ("model={vision: org/clip}", r"model: language is missing: vision and language go together"),
        ("model={vision_config: {}, text_config: {}}", r"model: tokenizer is missing"),
        ("model.dtype=int8", r"model\.dtype='int8': input should be 'auto', 'float32'"),
        ("model.quantization_config={}", r"quantization_config needs train: \[lora\]"),
        ("train=projector", r"train='projector': input should be a valid list"),
        ("train=[projektor]", r"train\.0='projektor': input should be 'vision_tower', 'projector'"),
        ("train=[lora, language_model]", r"leave one of them out"),
        ("lora.r=8", r"lora is given but train does not name it"),
        ("lora.r=many", r"lora: r='many': input should be a valid integer"),
        ("lora.rank=8", r"lora: rank is not an argument of LoraConfig"),
        ("lora.bias=yes", r"lora: bias=True: input should be 'none', 'all' or 'lora_only'"),
        ("lora.init_lora_weights=pissa", r"init_lora_weights=pissa: it changes the base weights"),
        ("lora.inference_mode=true", r"inference_mode=True trains nothing"),
        ("projector_lr=0", r"projector_lr=0: input should be greater than 0"),
        ("num_visual_tokens=many", r"num_visual_tokens: many is not a number of tokens per image"),
        ("num_visual_tokens=[]", r"num_visual_tokens: \[\] is not a number of tokens"),
        ("num_visual_tokens=[36, true]", r"num_visual_tokens: \[36, True\] is not a number of tokens"),
        ("num_visual_tokens=2020-01-01", r"2020-01-01 is a date; put it in quotes"),
        ("num_visual_tokens", r"The change num_visual_tokens: write it as key=value"),
        ("train.x=1", r"The change train\.x=1: train holds a value"),
        ("num_visual_tokens=[36", r"num_visual_tokens is not YAML"),
        ("model.config={1: 2}", r"the key 1 is a int, not text; put it in quotes"),
        ("model.config=&a {b: *a}", r"model\.config is nested too deep"),
        (f"model.config={'[' * 600}", r"model\.config is nested too deep"),
    ],
)
def test_what_cannot_run_is_one_sentence(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe_file, [override.replace("RECIPE", str(recipe_file))])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"There is no recipe .*none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match=r"list\.yaml should hold key: value pairs"):
        load_recipe(tmp_path / "list.yaml")


@pytest.mark.parametrize("key", ["model", "data", "train", "num_visual_tokens"])
def test_a_missing_section_is_named(recipe_file: Path, key: str) -> None:
    lines = [line for line in recipe_file.read_text().splitlines() if not line.startswith(key)]
    recipe_file.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=key):
        load_recipe(recipe_file)


def test_a_recipe_round_trips(recipe_file: Path, tmp_path: Path) -> None:
    overrides = ["train=[projector, lora]", "lora={r: 8, target_modules: [q_proj]}", "projector_lr=2e-5"]
    overrides += ["model.config={pad_token_id: null}", "arguments.learning_rate='2e-5'", "arguments.save_strategy=no"]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.arguments["learning_rate"] == 2e-5 and recipe.arguments["save_strategy"] == "no"
    write_yaml(recipe.to_dict(), tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_secrets_are_not_written(recipe_file: Path) -> None:
    token = "hf_" + "a" * 30
    overrides = [f"arguments.hub_token={token}", f"arguments.run_name={token}", "model.config={api_key: k, token: t}"]
    overrides += [f"model.config.inner=[{{password: p}}, 'https://user:{token}@host']", "model.config.pad_token=<pad>"]
    written = load_recipe(recipe_file, overrides).to_dict()
    assert token not in str(written)
    assert written["model"]["config"] == {"inner": [{}], "pad_token": "<pad>"}
    assert "hub_token" not in written["arguments"]


def test_a_few_lines_that_stand_for_billions_of_values_are_refused(recipe_file: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    recipe_file.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="more than 10,000 values"):
        load_recipe(recipe_file)


def test_a_logger_that_is_not_installed_is_named() -> None:
    with pytest.raises(RecipeError, match=r"arguments.report_to=comet_ml: pip install comet_ml, or leave it out"):
        make_arguments({"output_dir": "out", "report_to": "comet_ml"})
