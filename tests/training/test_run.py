"""Whole runs on a tiny model: what is trained, what is saved, and that a killed run ends where an unbroken one does."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.training.tiny_run import make_processor, make_tokenizer, recipe_content, write_data, write_model
from transformers_delta_llava.training import DataError, RecipeError, make_recipe, train
from transformers_delta_llava.training.recipe import write_yaml
from transformers_delta_llava.training.run import make_trainer
from transformers_delta_llava.training.trainer import merge_adapter


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
    run(folder, tmp_path, num_visual_tokens=[9, 4, 1], arguments=arguments)
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
    with pytest.raises(RecipeError, match="holds checkpoints of an earlier run: resume it with --resume"):
        run(folder, tmp_path)


def test_a_mismatch_of_checkpoint_and_recipe_is_named(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, arguments={"save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    other = write_model(tmp_path / "other", delta_rank=8)
    with pytest.raises(
        RecipeError, match=r"checkpoint-1: .*size mismatch for .*delta_u.*\[64, 16\].*\[64, 8\].*the same recipe"
    ):
        run(folder, tmp_path, resume=True, model={"path": str(other)})


def test_a_budget_that_the_grid_cannot_give_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"num_visual_tokens=64.*144, 36, 16, 9, 4, 1"):
        run(folder, tmp_path, num_visual_tokens=[4, 64])


def test_a_strangers_model_is_looked_at_before_it_is_built(folder: Path, tmp_path: Path) -> None:
    stranger = write_model(tmp_path / "stranger")
    (stranger / "chat_template.jinja").write_text("{{ 'x' * 9999999999 }}")
    with pytest.raises(RecipeError, match="^model: The chat template of .*stranger makes more than"):
        run(folder, tmp_path, model={"path": str(stranger)})
    config = json.loads((stranger / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 10**9
    (stranger / "config.json").write_text(json.dumps(config))
    for model in ({"path": str(stranger)}, {"path": None, "vision": str(stranger), "language": str(stranger)}):
        with pytest.raises(RecipeError, match="^model: .*num_hidden_layers=1000000000: [^.]*[.]$"):
            run(folder, tmp_path, model=model)


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
    changes = {"train": what, "num_visual_tokens": [36, 9, 1], "model": {"config": {"projector_drop_path": 0.5}}}
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
    content |= {"train": ["projector"], "num_visual_tokens": 36}
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


def checkpoints_of(folder: Path, out: Path, **arguments: Any) -> dict[str, Any]:
    """Trains to step 2 with a checkpoint after each; returns the recipe, which goes on to step 3."""
    arguments = {"output_dir": str(out), "save_strategy": "steps", "save_steps": 1, **arguments}
    content = recipe_content(folder, train=["projector"], arguments={**arguments, "max_steps": 2})
    train(make_recipe(content))
    content["arguments"]["max_steps"] = 3
    return content


def test_a_run_that_diverges_ends_there_and_saves_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    arguments = {"learning_rate": 1e30, "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    with pytest.raises(
        RecipeError, match=r"At step \d+ \d+ of \d+ trained tensors hold .* Lower arguments.learning_rate"
    ):
        run(folder, tmp_path, train=["projector"], arguments=arguments)
    assert not (tmp_path / "model.safetensors").exists()
    for checkpoint in tmp_path.glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint).values())


def test_weights_that_are_not_numbers_are_not_saved_as_the_finished_model(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_recipe(recipe_content(folder, arguments={"output_dir": str(tmp_path)})))
    next(trainer.model.model.multi_modal_projector.parameters()).data.view(-1)[0] = float("inf")
    for save in (trainer.save_model, lambda: trainer.save_final(str(tmp_path), None)):
        with pytest.raises(RecipeError, match="1 of .* trained tensors"):
            save()


def test_a_bad_image_that_a_worker_finds_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    file = write_data(tmp_path / "data", 4)
    (tmp_path / "data" / "1.png").write_bytes(b"not an image")
    data = {"path": str(file), "images": str(file.parent)}
    with pytest.raises(DataError, match=r"^row 1 \(id r1\) cannot be used: .*1\.png.*leaves such rows out\)\.$"):
        run(folder, tmp_path / "out", data=data, arguments={"dataloader_num_workers": 1})


def test_arguments_that_fail_only_when_the_run_begins_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    arguments = {"output_dir": str(tmp_path), "dataloader_multiprocessing_context": "spawn"}
    try:
        content = make_recipe(recipe_content(folder, arguments=arguments))
    except RecipeError:
        pytest.skip("this transformers has no such argument")
    with pytest.raises(
        RecipeError, match=r"cannot start with these arguments \(ValueError: multiprocessing_context can"
    ):
        train(content)


def test_a_checkpoint_without_optimizer_is_not_gone_on_from(folder: Path, tmp_path: Path) -> None:
    content = checkpoints_of(folder, tmp_path, save_only_model=True)
    with pytest.raises(RecipeError, match=r"checkpoint-2 lacks the optimizer's state.*as model.path"):
        train(make_recipe(content), resume=True)


def test_a_damaged_checkpoint_is_named(folder: Path, tmp_path: Path) -> None:
    """Files that a kill or a full disk cut off, and one that is something else."""
    content = checkpoints_of(folder, tmp_path)
    checkpoint = tmp_path / "checkpoint-2"
    refused = pytest.raises(
        RecipeError, match=r"cannot resume from .*checkpoint-2 \(.*delete that folder to resume from the one before"
    )
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        whole = (checkpoint / name).read_bytes()
        for damaged in (whole[: len(whole) // 2], b"[1, {" if name.startswith("rng") else b""):
            (checkpoint / name).write_bytes(damaged)
            with refused:
                train(make_recipe(content), resume=True)
        (checkpoint / name).write_bytes(whole)
    shutil.rmtree(checkpoint)
    train(make_recipe(content), resume=True)


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_a_full_disk_is_one_sentence_and_loses_no_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: Any, writer: str
) -> None:
    """As the two libraries report it: one by text alone, the other not at all."""
    content = checkpoints_of(folder, tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        if writer == "safetensors":
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 512 vs 406")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", full) if writer == "safetensors" else None
        patch.setattr(torch, "save", full) if writer == "torch" else None
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(
            RecipeError, match=r"The disk of .* is full, at step 3.*resume from .*checkpoint-2 with --resume"
        ):
            train(make_recipe(content), resume=True)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert not list(tmp_path.glob(".unfinished-*"))
    train(make_recipe(content), resume=True)


def test_a_finished_folder_holds_no_weights_of_an_earlier_run(folder: Path, tmp_path: Path) -> None:
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    for name in stale:
        (tmp_path / name).write_text("{}")
    run(folder, tmp_path, train=["projector"], arguments={"max_steps": 1})
    assert (tmp_path / "model.safetensors").is_file() and not any((tmp_path / name).exists() for name in stale)


def test_no_file_of_a_run_holds_the_token(folder: Path, tmp_path: Path) -> None:
    token = "hf_" + "s" * 30
    run(
        folder, tmp_path, train=["projector"], arguments={"hub_token": token, "max_steps": 1, "save_strategy": "epoch"}
    )
    assert list(tmp_path.glob("checkpoint-*/optimizer.pt"))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()] == []


def test_the_projector_has_a_learning_rate_of_its_own(folder: Path, tmp_path: Path) -> None:
    content = recipe_content(folder, arguments={"output_dir": str(tmp_path), "weight_decay": 0.1, "max_steps": 2})
    trainer = make_trainer(make_recipe({**content, "projector_lr": 1e-5}))
    trainer.train()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates: dict[float, set[str]] = {}
    for group in trainer.optimizer.param_groups:
        rates.setdefault(group["initial_lr"], set()).update(names[id(parameter)] for parameter in group["params"])
    assert rates.keys() == {1e-3, 1e-5}
    assert all("multi_modal_projector" in name for name in rates[1e-5])
    assert not any("multi_modal_projector" in name for name in rates[1e-3])
    assert sum(map(len, rates.values())) == sum(parameter.requires_grad for parameter in trainer.model.parameters())


def test_label_smoothing_in_a_recipe_begins_at_the_models_own_loss(folder: Path, tmp_path: Path) -> None:
    losses = {}
    for factor in (0.0, 1e-6, 0.5):
        arguments = {"label_smoothing_factor": factor, "max_steps": 1, "gradient_accumulation_steps": 2}
        out = run(folder, tmp_path / str(factor), train=["projector"], arguments=arguments)
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses[factor] = log[0]["loss"]
    assert losses[1e-6] == pytest.approx(losses[0.0], abs=1e-4) and losses[0.5] != pytest.approx(losses[0.0], abs=1e-4)


def test_qlora_trains_beside_a_quantized_language_model_and_ends_in_a_whole_one(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    content = recipe_content(folder, train=["projector", "lora"], lora={"r": 4, "lora_dropout": 0.0})
    content["model"]["quantization_config"] = {"load_in_4bit": True}
    content["arguments"] |= {"output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(make_recipe(content))
    kinds = {name: type(p).__name__ for name, p in trainer.model.named_parameters() if "lora_" not in name}
    quantized = {name.split(".")[3] for name, kind in kinds.items() if kind == "Params4bit"}
    assert quantized == {"language_model"}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    out = train(make_recipe(content))
    assert changed(folder / "model", out) == {"multi_modal_projector", "deltas", "language_model"}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    content["arguments"] |= {
        "output_dir": str(tmp_path / "again"),
        "resume_from_checkpoint": str(out / "checkpoint-2"),
    }
    assert_equal(out, train(make_recipe(content)))


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
        make_recipe(content)
