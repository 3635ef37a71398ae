"""LoRA in recipes: what is trained is saved, resumed and merged, or refused; every parameter has a gradient in every step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from tests.training.tiny_run import assert_same_weights, modalities_with_gradients, recipe_for, run, weights
from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.training import make_recipe, make_trainer
from transformers_delta_llava.training.trainer import merge_adapter


SMALL = {"r": 2, "lora_alpha": 8, "lora_dropout": 0.0}
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
        ("model", ["projector", "lora"], {}, {LANGUAGE, PROJECTOR}),
        ("tied", ["lora"], {"modules_to_save": ["lm_head"]}, {LANGUAGE, "lm_head"}),
        ("tied", ["lora"], {"modules_to_save": ["embed_tokens"]}, {LANGUAGE, "embed_tokens"}),
    ],
    ids=["modules", "tokens", "biases", "default", "tied head", "tied embeddings"],
)
def test_what_lora_trains_is_saved_resumed_and_merged(
    folder: Path, tmp_path: Path, model: str, names: list[str], lora: dict[str, Any], changed: set[str]
) -> None:
    changes: dict[str, Any] = {"train": names, "lora": {**SMALL, **lora}, "model": {"path": str(folder / model)}}
    out = run(folder, tmp_path / "out", arguments={"save_steps": 1}, **changes)
    trained = AutoModelForImageTextToText.from_pretrained(out).state_dict()
    base = AutoModelForImageTextToText.from_pretrained(folder / model)
    different = [name for name, tensor in base.state_dict().items() if not torch.equal(tensor, trained[name])]
    parts = (LANGUAGE, TOWER, PROJECTOR, "embed_tokens", "lm_head")
    assert {part for part in parts if any(part in name for name in different)} == changed

    adapted = PeftModel.from_pretrained(base, out / "adapter")
    # Without `lora` as under FSDP, where the model in memory is sharded.
    merged = adapted.merge_and_unload() if lora else merge_adapter(adapted, str(out / "adapter"), None)
    assert_same_weights(merged.state_dict(), trained, rtol=1e-5)

    arguments = {"save_steps": 1, "resume_from_checkpoint": str(out / "checkpoint-1")}
    assert_same_weights(run(folder, tmp_path / "resumed", arguments=arguments, **changes), out, rtol=1e-5)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["fc1", "fc2"]},
        {"target_modules": "all-linear"},
        {},
    ],
    ids=["q_proj and v_proj", "fc1 and fc2", "all-linear", "default"],
)
def test_adapters_leave_the_projector_alone_and_have_gradients_in_every_step(
    folder: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    """Also in batches without images: DDP waits for all gradients."""
    trainer = make_trainer(recipe_for(folder, tmp_path, train=["lora"], lora={**SMALL, **lora}))
    assert modalities_with_gradients(trainer) == {True, False}
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert not any(PROJECTOR in name or "vision_tower.encoder.layers.3" in name for name in names)
    assert any("vision_tower" in name for name in names) == bool(lora)


def test_what_peft_does_not_save_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No modules were targeted"):
        make_trainer(recipe_for(folder, tmp_path, train=["lora"], lora={**SMALL, "target_modules": ["nothing"]}))


def test_lora_needs_a_model_to_adapt(folder: Path, tmp_path: Path) -> None:
    content = recipe_for(folder, tmp_path).to_dict()
    content |= {"model": {"vision": "org/clip", "language": "org/llama"}, "train": ["lora"]}
    with pytest.raises(DeltaLlavaError, match="model.path"):
        make_recipe(content)


def test_qlora_trains_beside_a_quantized_language_model_and_ends_in_a_full_one(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    changes: dict[str, Any] = {"train": ["projector", "lora"], "lora": SMALL}
    changes["model"] = {"quantization_config": {"load_in_4bit": True}}
    trainer = make_trainer(recipe_for(folder, tmp_path, **changes))
    parameters = {name: parameter for name, parameter in trainer.model.named_parameters() if "lora_" not in name}
    quantized = {name.split(".")[3] for name, p in parameters.items() if type(p).__name__ == "Params4bit"}
    assert quantized == {"language_model"}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    out = run(folder, tmp_path / "out", arguments={"save_steps": 1}, **changes)
    old, new = weights(folder / "model"), weights(out)
    different = {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and different == {PROJECTOR, "language_model"}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    arguments = {"resume_from_checkpoint": str(out / "checkpoint-1")}
    assert_same_weights(out, run(folder, tmp_path / "again", arguments=arguments, **changes))
