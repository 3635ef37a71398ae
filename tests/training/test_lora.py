"""LoRA in recipes: what is trained is saved, resumed and merged, or refused; every gradient is there in every step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.training.tiny_run import recipe_content, write_data, write_model
from transformers_delta_llava.training import RecipeError, make_recipe, train
from transformers_delta_llava.training.run import make_trainer


SMALL = {"r": 2, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A model, the same with a tied head, and data that no test changes."""
    folder = tmp_path_factory.mktemp("lora")
    write_model(folder / "model")
    write_model(folder / "tied", tie_word_embeddings=True)
    write_data(folder / "data", 12)
    return folder


def content(folder: Path, out: Path, names: list[str], lora: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    arguments = {"output_dir": str(out), "save_strategy": "steps", "save_steps": 2, **arguments}
    return recipe_content(folder, train=names, lora={**SMALL, **lora}, arguments=arguments)


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], msg=name, atol=1e-6, rtol=1e-5)


LANGUAGE, TOWER, PROJECTOR = "language_model.layers", "vision_tower", "multi_modal_projector"


@pytest.mark.parametrize(
    ("model", "names", "lora", "changed"),
    [
        (
            "model",
            ["projector", "lora"],
            {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
            {LANGUAGE, TOWER, PROJECTOR, "embed_tokens"},
        ),
        (
            "model",
            ["lora"],
            {"target_modules": "all-linear", "trainable_token_indices": {"embed_tokens": [65, 66]}},
            {LANGUAGE, TOWER, "embed_tokens"},
        ),
        ("model", ["vision_tower", "deltas", "lora"], {"bias": "all"}, {LANGUAGE, TOWER, PROJECTOR}),
        ("tied", ["lora"], {"modules_to_save": ["lm_head"]}, {LANGUAGE, "lm_head"}),
        ("tied", ["lora"], {"modules_to_save": ["embed_tokens"]}, {LANGUAGE, "embed_tokens"}),
    ],
    ids=["modules", "tokens", "biases", "tied head", "tied embeddings"],
)
def test_what_lora_trains_is_saved_resumed_and_merged(
    folder: Path, tmp_path: Path, model: str, names: list[str], lora: dict[str, Any], changed: set[str]
) -> None:
    recipe = content(folder, tmp_path / "whole", names, lora)
    recipe["model"]["path"] = str(folder / model)
    whole = train(make_recipe(recipe))
    trained = AutoModelForImageTextToText.from_pretrained(whole).state_dict()
    before = AutoModelForImageTextToText.from_pretrained(folder / model).state_dict()
    differ = {name for name in before if not torch.equal(before[name], trained[name])}
    assert {
        part for part in (LANGUAGE, TOWER, PROJECTOR, "embed_tokens", "lm_head") if any(part in n for n in differ)
    } == changed

    base = AutoModelForImageTextToText.from_pretrained(folder / model)
    adapted = PeftModel.from_pretrained(base, whole / "adapter").merge_and_unload()
    assert_equal(adapted.state_dict(), trained)

    recipe["arguments"] |= {
        "output_dir": str(tmp_path / "resumed"),
        "resume_from_checkpoint": str(whole / "checkpoint-2"),
    }
    resumed = train(make_recipe(recipe))
    assert_equal(load_file(resumed / "model.safetensors"), load_file(whole / "model.safetensors"))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["fc1", "fc2"]},
        {"target_modules": "all-linear"},
        {},
    ],
    ids=["q_proj and v_proj", "fc1 and fc2", "all-linear", "by default"],
)
def test_adapters_lie_beside_the_projector_and_have_gradients_in_every_step(
    folder: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    """With and without images in the batch: DDP waits for all of them."""
    trainer = make_trainer(make_recipe(content(folder, tmp_path, ["lora"], lora)))
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names and not any(
        "multi_modal_projector" in name or "vision_tower.encoder.layers.3" in name for name in names
    )
    assert any("vision_tower" in name for name in names) == bool(lora)
    kinds = set()
    for batch in trainer.get_train_dataloader():
        counts = {name: batch.pop(name) for name in ("num_tokens", "num_images", "num_skipped")}
        kinds.add(counts["num_images"] > 0)
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        assert [name for name in names if trainer.model.get_parameter(name).grad is None] == []
    assert kinds == {True, False}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"modules_to_save": ["embed_tokenz"]}, "lora.modules_to_save: this model has no module embed_tokenz"),
        ({"modules_to_save": ["language_model"]}, "lora: No modules were targeted for adaptation"),
        ({"target_modules": ["nothing"]}, "lora: No modules were targeted for adaptation"),
        ({"target_modules": ["kv_proj"], "exclude_modules": "("}, "lora: "),
        ({"r": 0}, "lora: .*r"),
        ({"trainable_token_indices": [10**6]}, "lora: "),
    ],
)
def test_what_cannot_be_trained_and_saved_is_refused(
    folder: Path, tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_trainer(make_recipe(content(folder, tmp_path, ["lora"], lora)))
