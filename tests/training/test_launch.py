"""The command under `torchrun` and `accelerate launch`: two processes end where one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.training.tiny_run import recipe_content, write_data, write_model
from transformers_delta_llava.training import load_recipe, make_recipe, train
from transformers_delta_llava.training.recipe import write_yaml


ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
TORCHRUN += ["--rdzv_endpoint", "localhost:0"]
ARGUMENTS = {"per_device_train_batch_size": 4, "max_steps": 3, "max_grad_norm": 1.0, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A model, data, and what one process makes of them with four rows in a step."""
    folder = tmp_path_factory.mktemp("launch")
    write_model(folder / "model", projector_drop_path=0.0)
    write_data(folder / "data", 16)
    recipe(folder, "one")
    train(load_recipe(folder / "one.yaml"))
    return folder


def recipe(folder: Path, name: str, changes: dict[str, Any] | None = None, **arguments: Any) -> Path:
    """Writes a recipe, for a run into the folder `name`."""
    arguments = {**ARGUMENTS, "output_dir": str(folder / name), **arguments}
    content = recipe_content(folder, num_visual_tokens=[9, 4], arguments=arguments, **(changes or {}))
    write_yaml(make_recipe(content).to_dict(), folder / f"{name}.yaml")
    return folder / f"{name}.yaml"


def launch(command: list[str], **environment: str) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *(p for p in sys.path if p)])
    # AdamW's fused form sums in another order.
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(one: Path, two: Path, atol: float = 2e-5) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=atol, rtol=0, msg=name)


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_torchrun_with_ddp_ends_where_one_process_does(folder: Path) -> None:
    file = recipe(folder, "ddp", per_device_train_batch_size=2)
    launch([*TORCHRUN, "-m", "transformers_delta_llava", "train", str(file)])
    assert losses(folder / "ddp") == pytest.approx(losses(folder / "one"), abs=1e-4)
    assert_close(folder / "one", folder / "ddp")


FSDP = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2", "--num_processes", "2"]
FSDP += ["--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP", "--fsdp_state_dict_type=SHARDED_STATE_DICT"]
FSDP += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
FSDP += [str(Path(__file__).parent / "fsdp_on_cpu.py"), "train"]


def test_fsdp2_with_lora_ends_where_one_process_does(folder: Path) -> None:
    """What is trained beside the adapters is in the finished folder, too."""
    lora = {"r": 2, "lora_dropout": 0.0, "modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "v_proj"]}
    changes = {"train": ["projector", "lora"], "lora": lora, "projector_lr": 5e-4}
    train(load_recipe(recipe(folder, "one-lora", changes)))
    launch([*FSDP, str(recipe(folder, "fsdp-lora", changes, per_device_train_batch_size=2))])
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(folder / "one-lora" / "model.safetensors")
    for part in ("embed_tokens", "language_model.layers", "vision_tower", "multi_modal_projector"):
        assert any(part in name and not torch.equal(before[name], after[name]) for name in before), part
    assert_close(folder / "one-lora", folder / "fsdp-lora")


def test_accelerate_launch_with_fsdp2_ends_where_one_process_does_and_resumes(folder: Path) -> None:
    file = recipe(folder, "fsdp", per_device_train_batch_size=2, save_strategy="steps", save_steps=2)
    launch([*FSDP, str(file)])
    assert_close(folder / "one", folder / "fsdp")
    checkpoint = folder / "fsdp" / "checkpoint-2"
    assert any("pytorch_model_fsdp" in path.name for path in checkpoint.iterdir()), "it did not run under FSDP"
    assert AutoModelForImageTextToText.from_pretrained(checkpoint).config.architectures == [
        "DeltaLlavaForConditionalGeneration"
    ]

    resumed = recipe(folder, "resumed", per_device_train_batch_size=2, resume_from_checkpoint=str(checkpoint))
    launch([*FSDP, str(resumed)])
    assert_close(folder / "fsdp", folder / "resumed", atol=1e-6)
