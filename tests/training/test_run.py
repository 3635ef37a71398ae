"""Whole runs on a tiny model: what is trained, what is saved, and that a killed run ends where an unbroken one does."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.training.tiny_run import make_processor, make_tokenizer, recipe_content, write_data, write_model
from transformers_delta_llava.training import RecipeError, make_recipe, train
from transformers_delta_llava.training.run import make_trainer
from transformers_delta_llava.training.trainer import merge_adapter
from transformers_delta_llava.training.yaml_files import write_yaml


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A model and data that no test changes."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "model")
    write_data(folder / "data", 12)
    return folder


def run(
    folder: Path, out: Path, resume: bool = False, arguments: dict[str, Any] | None = None, **changes: Any
) -> Path:
    content = recipe_content(folder, arguments={"output_dir": str(out), **(arguments or {})}, **changes)
    return train(make_recipe(content), resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """The parts of the model that have other weights than before."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    names = {name for name in old if not torch.equal(old[name], new[name])}
    return {
        "deltas"
        if "delta_" in name
        else name.removeprefix("model.").split(".")[0].replace("lm_head", "language_model")
        for name in names
    }


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["projector"], {"multi_modal_projector", "deltas"}),
        (["deltas"], {"deltas"}),
        (["vision_tower"], {"vision_tower"}),
        (["projector", "language_model"], {"multi_modal_projector", "deltas", "language_model"}),
    ],
)
def test_what_is_trained_is_what_the_recipe_lists(
    folder: Path, tmp_path: Path, names: list[str], parts: set[str]
) -> None:
    run(folder, tmp_path, train=names, arguments={"max_steps": 2})
    assert changed(folder / "model", tmp_path) == parts


def test_every_trained_parameter_has_a_gradient_in_every_step(folder: Path, tmp_path: Path) -> None:
    """Of batches with and without images: DDP and FSDP wait for all of them."""
    content = recipe_content(folder, arguments={"output_dir": str(tmp_path)})
    trainer = make_trainer(make_recipe({**content, "train": ["vision_tower", "projector", "language_model"]}))
    kinds = set()
    for batch in trainer.get_train_dataloader():
        counts = {name: batch.pop(name) for name in ("num_tokens", "num_images", "num_skipped")}
        kinds.add(counts["num_images"] > 0)
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert [name for name, parameter in trained.items() if parameter.grad is None] == []
        assert any("vision_tower" in name for name in trained) and not any(
            "layers.3" in name and "vision" in name for name in trained
        )
    assert kinds == {True, False}


def test_a_run_leaves_hub_folders_and_a_log(folder: Path, tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    run(folder, tmp_path, visual_tokens=[9, 4, 1], arguments=arguments)
    for place in (tmp_path, tmp_path / "checkpoint-2"):
        names = {path.name for path in place.iterdir()}
        assert {"config.json", "model.safetensors", "modeling_delta_llava.py", "processing_delta_llava.py"} <= names
        assert {"projector_delta_llava.py", "tokenizer.json", "processor_config.json", "chat_template.jinja"} <= names
        config = json.loads((place / "config.json").read_text())
        assert config["architectures"] == ["DeltaLlavaForConditionalGeneration"] and "AutoModel" in config["auto_map"]
        assert AutoProcessor.from_pretrained(place).num_visual_tokens == 9
        model = AutoModelForImageTextToText.from_pretrained(place)
        assert model.config.num_visual_tokens == 9
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert all(entry["tokens_per_second"] > 0 and entry["memory_gib"] > 0 for entry in log if "loss" in entry)
    assert sum(entry["images_per_second"] > 0 for entry in log if "loss" in entry) >= 1
    assert (tmp_path / "recipe.yaml").is_file() and (tmp_path / "train_results.json").is_file()


def test_a_run_is_refused_over_an_earlier_ones_checkpoints(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, arguments={"save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    with pytest.raises(RecipeError, match="holds checkpoints of an earlier run: go on with --resume"):
        run(folder, tmp_path)


def test_a_mismatch_of_checkpoint_and_recipe_is_named(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, arguments={"save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    other = write_model(tmp_path / "other", delta_rank=8)
    with pytest.raises(RecipeError, match=r"delta_u is \(192, 16\), this model's \(192, 8\)"):
        run(folder, tmp_path, resume=True, model={"path": str(other)})


def test_a_budget_that_the_grid_cannot_give_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"num_visual_tokens=64.*144, 36, 16, 9, 4, 1"):
        run(folder, tmp_path, visual_tokens=[4, 64])


def test_lora_is_trained_resumed_and_merged(folder: Path, tmp_path: Path) -> None:
    """The projector is trained beside it; the finished folder is a plain model, the adapter lies beside it."""
    from peft import PeftModel

    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    changes = {"train": ["projector", "lora"], "lora": lora}
    whole = run(folder, tmp_path / "whole", arguments=arguments, **changes)
    assert changed(folder / "model", whole) == {"multi_modal_projector", "deltas", "language_model"}
    old, new = weights(folder / "model"), weights(whole)
    assert torch.equal(old["lm_head.weight"], new["lm_head.weight"]), "LoRA is on the linear layers alone"

    base = AutoModelForImageTextToText.from_pretrained(folder / "model")
    # As under FSDP, where the model in memory is in pieces.
    adapted = merge_adapter(PeftModel.from_pretrained(base, whole / "adapter"), str(whole / "adapter"), None)
    merged = AutoModelForImageTextToText.from_pretrained(whole)
    for (name, one), (_, two) in zip(merged.state_dict().items(), adapted.state_dict().items()):
        torch.testing.assert_close(one, two, msg=name, atol=1e-6, rtol=1e-5)

    (whole / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    arguments["resume_from_checkpoint"] = str(tmp_path / "checkpoint-2")
    resumed = run(folder, tmp_path / "resumed", arguments=arguments, **changes)
    assert_equal(whole, resumed)


def test_lora_with_deltas_trains_no_more_of_the_projector(folder: Path, tmp_path: Path) -> None:
    changes = {"train": ["deltas", "lora"], "lora": {"r": 2}}
    assert changed(folder / "model", run(folder, tmp_path, **changes)) == {"deltas", "language_model"}


def assert_equal(one: Path, two: Path) -> None:
    """Final weights equal to 1e-6."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=0, msg=name)


def test_a_killed_run_goes_on_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """Killed without warning at a random step of three epochs, with sampled budgets, dropout, accumulated batches."""
    step = random.SystemRandom().randint(3, 8)  # of 9; SystemRandom, because training seeds the other one
    arguments = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": -1,
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 0.2,
        "lr_scheduler_type": "cosine",
    }
    what = ["vision_tower", "projector", "language_model"]
    changes = {"train": what, "visual_tokens": [36, 9, 1], "model": {"config": {"projector_drop_path": 0.5}}}
    whole = run(folder, tmp_path / "whole", arguments=arguments, **changes)
    log = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["step"] == 9

    content = recipe_content(folder, arguments={**arguments, "output_dir": str(tmp_path / "killed")}, **changes)
    write_yaml(make_recipe(content).to_dict(), tmp_path / "recipe.yaml")
    killed = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path / "recipe.yaml"), str(step)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert killed.returncode == -9, killed.stderr
    saved = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
    assert saved == {f"checkpoint-{number}" for number in range(2, step, 2)}, f"killed at step {step}"
    resumed = train(make_recipe(content), resume=True)
    assert_equal(whole, resumed)
    again = json.loads((resumed / "trainer_state.json").read_text())["log_history"]
    assert [e["loss"] for e in log if "loss" in e] == pytest.approx(
        [e["loss"] for e in again if "loss" in e], abs=1e-6
    )


KILL = """
import os, signal, sys
from transformers import TrainerCallback
from transformers_delta_llava.training import load_recipe
from transformers_delta_llava.training.run import make_trainer

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

trainer = make_trainer(load_recipe(sys.argv[1]))
trainer.add_callback(Kill())
trainer.train()
"""


def environment() -> dict[str, str]:
    """Of a child process that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p]), "OMP_NUM_THREADS": "1"}


def test_gradient_checkpointing_changes_nothing(folder: Path, tmp_path: Path) -> None:
    runs = {
        name: run(
            folder, tmp_path / name, train=["projector"], arguments={"gradient_checkpointing": on, "max_steps": 3}
        )
        for name, on in (("off", False), ("on", True))
    }
    assert_equal(runs["off"], runs["on"])
    assert changed(folder / "model", runs["on"]) == {"multi_modal_projector", "deltas"}


def test_bf16_keeps_what_is_trained_in_float32_and_ends_in_bf16(folder: Path, tmp_path: Path) -> None:
    arguments = {"bf16": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    out = run(folder, tmp_path, train=["projector"], arguments=arguments)
    checkpoint = weights(tmp_path / "checkpoint-2")
    kinds = {"projector" in name: tensor.dtype for name, tensor in checkpoint.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def parts(folder: Path) -> dict[str, str]:
    """A vision tower and a language model, each as on the Hub."""
    from transformers import AutoModel, AutoModelForCausalLM

    from tests.training.tiny_run import make_image_processor, make_model

    config = make_model().config
    AutoModel.from_config(config.vision_config).save_pretrained(folder / "vision")
    make_image_processor().save_pretrained(folder / "vision")
    language = AutoModelForCausalLM.from_config(config.text_config)
    # Vicuna's generation settings, which new transformers refuse to save.
    language.save_pretrained(folder / "language")
    settings = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "eos_token_id": 258}
    (folder / "language" / "generation_config.json").write_text(json.dumps(settings))
    make_tokenizer(
        [t for t in make_processor().tokenizer.all_special_tokens if t not in ("<image>", "<pad>")]
    ).save_pretrained(folder / "language")
    return {"vision": str(folder / "vision"), "language": str(folder / "language")}


def test_two_pretrained_parts_become_a_model(folder: Path, tmp_path: Path) -> None:
    content = recipe_content(folder, arguments={"output_dir": str(tmp_path / "out"), "max_steps": 2})
    content["model"] = {**parts(tmp_path), "config": {"vision_feature_levels": [1, 2, 3]}}
    content |= {"train": ["projector"], "visual_tokens": 36}
    content["data"] |= {"chat_template": "plain", "on_error": "skip", "pad_images": False}
    out = train(make_recipe(content))
    left_out = [json.loads(line)["row"] for line in (out / "skipped_rows.jsonl").read_text().splitlines()]
    assert left_out == ["row 3 (id r3)", "row 7 (id r7)", "row 11 (id r11)"], "text is no caption"
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.config.num_visual_tokens == processor.num_visual_tokens == 36 and processor.do_pad is False
    assert list(processor.visual_token_budgets) == [144, 36, 16, 9, 4, 1]
    assert model.config.image_token_id == processor.image_token_id < model.config.text_config.vocab_size
    language = AutoModelForImageTextToText.from_pretrained(out).model.language_model
    source = load_file(Path(content["model"]["language"]) / "model.safetensors")
    torch.testing.assert_close(language.norm.weight, source["model.norm.weight"])


def test_two_configs_become_a_model(folder: Path, tmp_path: Path) -> None:
    from tests.tiny import TEXT, VISION

    text = {key: value for key, value in TEXT.items() if key != "vocab_size" and not key.endswith("_id")}
    tokenizer = make_tokenizer()
    del tokenizer.init_kwargs["padding_side"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    content = recipe_content(folder, arguments={"output_dir": str(tmp_path / "out"), "max_steps": 2})
    content["model"] = {
        "vision_config": VISION,
        "text_config": text,
        "tokenizer": str(tmp_path / "tokenizer"),
        "config": {"vision_feature_levels": [1, 2, 3]},
    }
    content["train"] = ["vision_tower", "projector", "language_model"]
    out = train(make_recipe(content))
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.config.text_config.vocab_size == len(make_tokenizer())
    processor = AutoProcessor.from_pretrained(out)
    assert processor.image_processor.crop_size["height"] == VISION["image_size"]
    assert processor.tokenizer.padding_side == "left", "generation in batches needs it"


def test_lora_needs_a_model_to_adapt(folder: Path, tmp_path: Path) -> None:
    content = recipe_content(folder, arguments={"output_dir": str(tmp_path)})
    content |= {"model": {"vision": "org/clip", "language": "org/llama"}, "train": ["lora"]}
    with pytest.raises(RecipeError, match="name it as model.path"):
        train(make_recipe(content))
