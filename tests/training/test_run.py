"""Whole runs on a tiny model: what is trained and saved, resuming, and failures as one line."""

import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from tests.robustness.children import outcome
from tests.tiny import TEXT, VISION
from tests.training.tiny_run import (
    assert_same_weights,
    losses,
    make_processor,
    make_tokenizer,
    modalities_with_gradients,
    recipe_content,
    recipe_for,
    run,
    weights,
    write_data,
    write_model,
    write_parts,
)
from transformers_delta_llava.conversion import inspect_model
from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.training import make_recipe, make_trainer, run_trainer, train
from transformers_delta_llava.training.trainer import COUNTS, PLACED, WRITTEN, place_result


def changed_parts(before: Path, after: Path) -> set[str]:
    """The parts of the model whose weights differ."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    names = [name.removeprefix("model.") for name in old if not torch.equal(old[name], new[name])]
    return {
        "deltas" if "delta_" in name else name.split(".")[0].replace("lm_head", "language_model") for name in names
    }


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train": ["projector"]}, {"multi_modal_projector", "deltas"}),
        ({"train": ["deltas"]}, {"deltas"}),
        ({"train": ["vision_tower"]}, {"vision_tower"}),
        ({"train": ["projector", "language_model"]}, {"multi_modal_projector", "deltas", "language_model"}),
        ({"train": ["deltas", "lora"], "lora": {"r": 2}}, {"deltas", "language_model"}),
    ],
    ids=lambda value: "-".join(value["train"]) if isinstance(value, dict) else "",
)
def test_a_run_trains_what_the_recipe_lists(folder: Path, tmp_path: Path, changes: Any, parts: set[str]) -> None:
    assert changed_parts(folder / "model", run(folder, tmp_path, **changes)) == parts


def test_every_trained_parameter_has_a_gradient_in_every_step(folder: Path, tmp_path: Path) -> None:
    """Also in batches without images: DDP and FSDP wait for all gradients."""
    trainer = make_trainer(recipe_for(folder, tmp_path, train=["vision_tower", "projector", "language_model"]))
    assert modalities_with_gradients(trainer) == {True, False}
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert any("vision_tower" in name for name in trained)
    assert not any("vision_tower" in name and "layers.3" in name for name in trained), "this layer does not run"


def test_a_run_leaves_hub_folders_and_a_log(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, num_visual_tokens=[9, 4, 1], arguments={"save_steps": 2, "max_steps": 3})
    for path in (tmp_path, tmp_path / "checkpoint-2"):
        names = {file.name for file in path.iterdir()}
        assert {"config.json", "model.safetensors", "modeling_delta_llava.py", "processing_delta_llava.py"} <= names
        assert {"projector_delta_llava.py", "tokenizer.json", "processor_config.json", "chat_template.jinja"} <= names
        config = json.loads((path / "config.json").read_text())
        assert config["architectures"] == ["DeltaLlavaForConditionalGeneration"] and "AutoModel" in config["auto_map"]
        assert AutoProcessor.from_pretrained(path).num_visual_tokens == 9
        assert AutoModelForImageTextToText.from_pretrained(path).config.num_visual_tokens == 9
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and entry["memory_gib"] > 0 for entry in steps)
    assert any(entry["images_per_second"] > 0 for entry in steps)
    assert (tmp_path / "recipe.yaml").is_file() and (tmp_path / "train_results.json").is_file()


def test_a_budget_that_the_grid_cannot_give_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_visual_tokens=64.*144, 36, 16, 9, 4, 1"):
        run(folder, tmp_path, num_visual_tokens=[4, 64])


def test_gradient_checkpointing_changes_no_result(folder: Path, tmp_path: Path) -> None:
    for name, enabled in (("off", False), ("on", True)):
        run(folder, tmp_path / name, train=["projector"], arguments={"gradient_checkpointing": enabled})
    assert_same_weights(tmp_path / "off", tmp_path / "on")


def test_packing_changes_no_result(folder: Path, tmp_path: Path) -> None:
    for name, pack in (("padded", False), ("packed", True)):
        arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        run(folder, tmp_path / name, pack=pack, num_visual_tokens=[9, 4], arguments=arguments)
    assert_same_weights(tmp_path / "padded", tmp_path / "packed", atol=2e-5)


def test_a_frozen_tower_is_not_checkpointed(folder: Path, tmp_path: Path) -> None:
    arguments = {"gradient_checkpointing": True, "max_steps": 1}
    trainer = make_trainer(recipe_for(folder, tmp_path, arguments, train=["projector"]))
    tower, language = trainer.model.model.vision_tower, trainer.model.model.language_model
    trainer.train()
    batch = {name: value for name, value in next(iter(trainer.get_train_dataloader())).items() if name not in COUNTS}
    calls: Counter[str] = Counter()
    for name, part in (("tower", tower), ("language", language)):
        for layer in getattr(part, "layers", None) or part.encoder.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    trainer.compute_loss(trainer.model, batch).backward()
    assert calls == {"tower": 3, "language": 4}, "the language model's two layers run twice, the tower's once"


def test_bf16_keeps_trained_weights_in_float32_and_ends_in_bf16(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, train=["projector"], arguments={"bf16": True, "save_steps": 1})
    kinds = {"projector" in name: tensor.dtype for name, tensor in weights(tmp_path / "checkpoint-1").items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_projector_has_its_own_learning_rate(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(recipe_for(folder, tmp_path, {"weight_decay": 0.1}, projector_lr=1e-5))
    trainer.train()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates: dict[float, set[str]] = {}
    for group in trainer.optimizer.param_groups:
        rates.setdefault(group["initial_lr"], set()).update(names[id(parameter)] for parameter in group["params"])
    assert rates.keys() == {1e-3, 1e-5}
    assert all("multi_modal_projector" in name for name in rates[1e-5])
    assert not any("multi_modal_projector" in name for name in rates[1e-3])
    assert sum(map(len, rates.values())) == sum(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_finished_folder_has_no_weights_of_an_earlier_run_and_no_token(folder: Path, tmp_path: Path) -> None:
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    for name in stale:
        (tmp_path / name).write_text("{}")
    token = "hf_" + "s" * 30
    arguments = {"hub_token": token, "max_steps": 1, "save_strategy": "epoch"}
    run(folder, tmp_path, train=["projector"], arguments=arguments)
    assert (tmp_path / "model.safetensors").is_file() and not any((tmp_path / name).exists() for name in stale)
    assert list(tmp_path.glob("checkpoint-*/optimizer.pt"))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("moved", [None, [], ["generation_config.json", "model.safetensors"]])
def test_a_result_whose_run_was_killed_is_put_in_place_by_the_next(folder: Path, tmp_path: Path, moved: Any) -> None:
    """Killed before the earlier weights were deleted, after it, or between two files."""
    earlier, new = run(folder, tmp_path / "earlier"), run(folder, tmp_path / "new", arguments={"seed": 3})
    shutil.copytree(new, earlier / (WRITTEN if moved is None else PLACED))
    for name in ["config.json", "model.safetensors"] if moved is not None else []:
        (earlier / name).unlink()
    for name in moved or []:
        (earlier / PLACED / name).replace(earlier / name)
    place_result(earlier)
    assert_same_weights(earlier, new, atol=0)
    assert not (earlier / WRITTEN).exists() and not (earlier / PLACED).exists()
    AutoModelForImageTextToText.from_pretrained(earlier)


def test_a_finished_run_has_a_card_and_nothing_to_complain_about(folder: Path, tmp_path: Path) -> None:
    out = run(folder, tmp_path / "out", num_visual_tokens=[36, 4])
    text = (out / "README.md").read_text()
    assert metadata_load(out / "README.md")["library_name"] == "transformers"
    assert all(fact in text for fact in ("rows.json", "projector", "36, 4 visual tokens", "# out"))
    assert not any(str(path) in text for path in (folder, tmp_path))
    assert inspect_model(out).problems == []


# ---------------------------------------------------------------------------- where a model comes from


def test_two_pretrained_parts_become_a_model(folder: Path, tmp_path: Path) -> None:
    parts, language = write_parts(tmp_path), tmp_path / "language"
    # Vicuna's generation settings, which transformers refuses to save.
    settings = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "eos_token_id": 258}
    (language / "generation_config.json").write_text(json.dumps(settings))
    special = make_processor().tokenizer.all_special_tokens
    make_tokenizer(special=[t for t in special if t not in ("<image>", "<pad>")]).save_pretrained(language)

    data = {"chat_template": "plain", "on_error": "skip", "pad_images": False}
    content = recipe_content(folder, train=["projector"], num_visual_tokens=36, data=data)
    content["model"] = parts
    content["arguments"]["output_dir"] = str(tmp_path / "out")
    out = train(make_recipe(content))
    skipped = [json.loads(line)["row"] for line in (out / "skipped_rows.jsonl").read_text().splitlines()]
    assert skipped == [f"row {n} (id r{n})" for n in (3, 7, 11, 15)], "text without images is not a caption"
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.config.num_visual_tokens == processor.num_visual_tokens == 36 and processor.do_pad is False
    assert list(processor.visual_token_budgets) == [144, 36, 16, 9, 4, 1]
    assert model.config.image_token_id == processor.image_token_id < model.config.text_config.vocab_size
    torch.testing.assert_close(model.model.language_model.norm.weight, weights(language)["model.norm.weight"])


def test_two_configs_become_a_model(folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    del tokenizer.init_kwargs["padding_side"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    content = recipe_content(folder, train=["vision_tower", "projector", "language_model"])
    content["model"] = {
        "vision_config": VISION,
        "text_config": {key: value for key, value in TEXT.items() if key != "vocab_size" and not key.endswith("_id")},
        "tokenizer": str(tmp_path / "tokenizer"),
        "config": {"vision_feature_levels": [1, 2, 3]},
    }
    content["arguments"]["output_dir"] = str(tmp_path / "out")
    out = train(make_recipe(content))
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.config.text_config.vocab_size == len(make_tokenizer()) + 1  # <video>
    assert processor.image_processor.crop_size["height"] == VISION["image_size"]
    assert processor.tokenizer.padding_side == "left", "generation in batches needs it"


# ---------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def checkpoints(folder: Path, tmp_path_factory: Any) -> Path:
    """A run of two steps with a checkpoint after each."""
    return run(folder, tmp_path_factory.mktemp("checkpoints"), train=["projector"], arguments={"save_steps": 1})


@pytest.fixture
def resume(folder: Path, checkpoints: Path, tmp_path: Path) -> Any:
    """Resumes a copy of `checkpoints`, in `tmp_path / "out"`, for a third step."""
    shutil.copytree(checkpoints, tmp_path / "out")
    arguments = {"save_steps": 1, "max_steps": 3}

    def resume(resume: bool = True, **changes: Any) -> Path:
        changes = {"arguments": arguments, **changes}
        return run(folder, tmp_path / "out", resume, train=["projector"], **changes)

    return resume


def test_another_run_does_not_overwrite_checkpoints(resume: Any) -> None:
    with pytest.raises(DeltaLlavaError, match="resume=True"):
        resume(False)


def test_a_checkpoint_of_another_model_is_refused(resume: Any, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", delta_rank=8)
    with pytest.raises(RuntimeError, match=r"size mismatch.*delta_u.*\[64, 16\].*\[64, 8\]"):
        resume(model={"path": str(other)})


def test_a_checkpoint_without_optimizer_is_refused(resume: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(DeltaLlavaError, match="optimizer"):
        resume()


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"arguments": {"per_device_train_batch_size": 4}}, "rows_per_step 2, now 4"),
        ({"arguments": {"data_seed": 5}}, "seed 42, now 5"),
        ({"num_visual_tokens": [4, 9]}, "budgets"),
        ({"arguments": {"train_sampling_strategy": "random"}}, "strategy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_does_not_go_on_in_another_order(resume: Any, changes: dict[str, Any], differs: str) -> None:
    arguments = {"save_steps": 1, "max_steps": 3, **changes.pop("arguments", {})}
    with pytest.raises(DeltaLlavaError, match=differs):
        resume(arguments=arguments, **changes)


def test_a_run_does_not_go_on_with_other_rows(resume: Any, tmp_path: Path) -> None:
    file = write_data(tmp_path / "data", 12)
    with pytest.raises(DeltaLlavaError, match="rows 24, now 12|rows 16, now 12"):
        resume(data={"path": str(file), "images": str(file.parent)})


def test_a_run_that_is_told_to_stop_leaves_no_finished_model(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(recipe := recipe_for(folder, tmp_path, {"save_steps": 1, "max_steps": 3}))

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = control.should_save = state.global_step == 2
            return control

    trainer.add_callback(Stop())
    with pytest.raises(DeltaLlavaError, match=r"step 2 of 3.*checkpoint-2"):
        run_trainer(trainer, recipe)
    assert not (tmp_path / "model.safetensors").exists()
    assert run(folder, tmp_path, True, arguments={"save_steps": 1, "max_steps": 3}) == tmp_path


def test_held_out_rows_are_evaluated(folder: Path, tmp_path: Path, caplog: Any) -> None:
    file = write_data(tmp_path / "held out", 4)
    arguments = {"eval_strategy": "steps", "eval_steps": 1}
    caplog.set_level("INFO")
    out = run(
        folder,
        tmp_path / "out",
        data={"eval_path": str(file), "images": str(file.parent), "path": str(file)},
        arguments=arguments,
    )
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in log if entry.get("eval_loss", 0) > 0]) == 2
    assert "on held-out rows" in caplog.text and str(out) in caplog.text


def test_a_killed_run_resumes_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """Killed without warning at a random step of three epochs, with sampled budgets, dropout, accumulated batches."""
    arguments = {
        "save_steps": 2,
        "max_steps": -1,
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 0.2,
        "lr_scheduler_type": "cosine",
    }
    changes: dict[str, Any] = {"train": ["vision_tower", "projector", "language_model"], "arguments": arguments}
    changes |= {"num_visual_tokens": [36, 9, 1], "model": {"config": {"projector_drop_path": 0.5}}}
    unbroken = run(folder, tmp_path / "unbroken", **changes)
    assert len(losses(unbroken)) == 12

    step = random.SystemRandom().randint(3, 11)  # SystemRandom, because training seeds the other generator

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    def train_until_killed() -> None:
        trainer = make_trainer(recipe_for(folder, tmp_path / "killed", **changes))
        trainer.add_callback(Kill())
        trainer.train()

    assert outcome(train_until_killed, timeout=300) == {"died": signal.SIGKILL}
    saved = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
    assert saved == {f"checkpoint-{number}" for number in range(2, step, 2)}, f"killed at step {step}"
    resumed = run(folder, tmp_path / "killed", resume=True, **changes)
    assert_same_weights(unbroken, resumed)
    assert losses(unbroken) == pytest.approx(losses(resumed), abs=1e-6)


# ---------------------------------------------------------------------------- failures


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    arguments = {"learning_rate": 1e30, "save_steps": 1, "max_steps": 8}
    message = r"at step \d+: \d+ of \d+ trained tensors .* arguments.learning_rate"
    with pytest.raises(DeltaLlavaError, match=message):
        run(folder, tmp_path, train=["projector"], arguments=arguments)
    assert not (tmp_path / "model.safetensors").exists()
    for checkpoint in tmp_path.glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint).values())


def test_weights_that_are_not_finite_are_not_saved(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(recipe_for(folder, tmp_path))
    next(trainer.model.model.multi_modal_projector.parameters()).data.view(-1)[0] = float("inf")
    for save in (trainer.save_model, lambda: trainer.save_final(tmp_path, None)):
        with pytest.raises(DeltaLlavaError, match="1 of .* trained tensors"):
            save()


def test_a_bad_image_in_a_worker_process_is_named(folder: Path, tmp_path: Path) -> None:
    file = write_data(tmp_path / "data", 4)
    (tmp_path / "data" / "1.png").write_bytes(b"not an image")
    data = {"path": str(file), "images": str(file.parent)}
    with pytest.raises(DeltaLlavaError, match=r"row 1 \(id r1\)"):
        run(folder, tmp_path / "out", data=data, arguments={"dataloader_num_workers": 1})
