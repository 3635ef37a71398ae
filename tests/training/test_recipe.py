"""What a recipe may say, and what is refused, by key."""

from pathlib import Path

import pytest

from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.training import load_recipe
from transformers_delta_llava.training.recipe import write_yaml


RECIPE = """
model: {path: org/model}
data: {path: rows.json, chat_template: plain}
train: [projector]
num_visual_tokens: 144
arguments: {output_dir: out, learning_rate: 1e-3}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def test_a_recipe_is_read_changed_and_written(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.budgets == (144,)
    assert recipe.arguments["learning_rate"] == 0.001  # YAML 1.1 takes 1e-3 for a string
    overrides = [
        "num_visual_tokens=[36, 4]",
        "arguments.max_steps=3",
        "model.config.delta_rank=8",
        "data.on_error=skip",
    ]
    overrides += ["train=[projector, lora]", "lora={r: 8, target_modules: [q_proj]}", "arguments.save_strategy=no"]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.budgets == (36, 4) and recipe.arguments["max_steps"] == 3
    assert recipe.model.config == {"delta_rank": 8} and recipe.data.on_error == "skip"
    write_yaml(recipe.to_dict(), tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("num_visual_token=36", "num_visual_token"),
        ("data.img=x", r"data\.img"),
        ("arguments.output_dir=", "output_dir"),
        ("arguments.label_smoothing_factor=0.1", "label_smoothing_factor"),
        ("data.on_error=ignore", r"data\.on_error"),
        ("data.max_length=0", r"data\.max_length"),
        ("data.dataset=org/data", "data: .*path.*dataset"),
        ("model.vision=org/clip", "model: .*path; vision and language"),
        ("model={vision: org/clip}", "model: .*vision and language"),
        ("model={vision_config: {}, text_config: {}}", "tokenizer"),
        ("model.dtype=int8", r"model\.dtype"),
        ("model.quantization_config={}", "quantization_config"),
        ("train=[projektor]", "train"),
        ("train=[lora, language_model]", "language_model and lora"),
        ("lora.r=8", "lora"),
        ("lora.init_lora_weights=pissa", "init_lora_weights=pissa"),
        ("lora.lora_bias=true", "lora_bias"),
        ("lora.alora_invocation_tokens=[1]", "alora_invocation_tokens"),
        ("projector_lr=0", "projector_lr"),
        ("num_visual_tokens=many", "num_visual_tokens"),
    ],
)
def test_what_cannot_run_is_refused_by_key(recipe_file: Path, override: str, key: str) -> None:
    with pytest.raises(DeltaLlavaError, match=key):
        load_recipe(recipe_file, [override])


@pytest.mark.parametrize("key", ["model", "data", "train", "arguments"])
def test_a_missing_section_is_named(recipe_file: Path, key: str) -> None:
    lines = [line for line in recipe_file.read_text().splitlines() if not line.startswith(key)]
    recipe_file.write_text("\n".join(lines))
    with pytest.raises(DeltaLlavaError, match=key):
        load_recipe(recipe_file)


def test_arguments_have_defaults_that_tell_something(recipe_file: Path) -> None:
    arguments = load_recipe(recipe_file, ["arguments.gradient_checkpointing=true"]).training_arguments()
    assert arguments.logging_steps == 0.05 and not arguments.remove_unused_columns and arguments.report_to == []
    kwargs = getattr(arguments, "activation_checkpointing_kwargs", None) or arguments.gradient_checkpointing_kwargs
    assert kwargs == {"use_reentrant": False}
    assert load_recipe(recipe_file, ["arguments.max_steps=3"]).training_arguments().logging_steps == 1
