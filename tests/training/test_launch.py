"""Training under `torchrun` and `accelerate launch`: two processes end where one does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.training.tiny_run import assert_same_weights, losses, recipe_for, weights
from transformers_delta_llava.training import train
from transformers_delta_llava.training.recipe import write_yaml


ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
TORCHRUN += ["--rdzv_endpoint", "localhost:0"]
FSDP = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2", "--num_processes", "2"]
FSDP += ["--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP", "--fsdp_state_dict_type=SHARDED_STATE_DICT"]
FSDP += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
LORA = {"r": 2, "lora_dropout": 0.0, "modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "v_proj"]}
LORA_RUN = {"train": ["projector", "lora"], "lora": LORA, "projector_lr": 5e-4}


def launch(command: list[str]) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *(p for p in sys.path if p)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]


def recipe(folder: Path, out: Path, rows: int, arguments: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Three steps with `rows` rows per process."""
    arguments = {"per_device_train_batch_size": rows, "max_steps": 3, "max_grad_norm": 1.0, **(arguments or {})}
    return recipe_for(folder, out, arguments, num_visual_tokens=[9, 4], **changes)


def write(folder: Path, out: Path, **options: Any) -> str:
    """The recipe as a file, for two processes with two rows each."""
    write_yaml(recipe(folder, out, 2, **options).to_dict(), out.with_suffix(".yaml"))
    return str(out.with_suffix(".yaml"))


@pytest.fixture(scope="module")
def one_process(folder: Path, tmp_path_factory: Any) -> Path:
    """The result of one process with four rows per step."""
    return train(recipe(folder, tmp_path_factory.mktemp("one"), 4))


def test_torchrun_with_ddp_ends_where_one_process_does(folder: Path, one_process: Path, tmp_path: Path) -> None:
    launch([*TORCHRUN, "-m", "transformers_delta_llava", "train", write(folder, tmp_path / "ddp")])
    assert losses(tmp_path / "ddp") == pytest.approx(losses(one_process), abs=1e-4)
    assert_same_weights(one_process, tmp_path / "ddp", atol=2e-5)


def test_fsdp2_ends_where_one_process_does_also_with_lora_and_resumed(
    folder: Path, one_process: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "fsdp" / "checkpoint-2"
    recipes = [
        write(folder, tmp_path / "lora", **LORA_RUN),
        write(folder, tmp_path / "fsdp", arguments={"save_steps": 2}),
        write(folder, tmp_path / "resumed", arguments={"resume_from_checkpoint": str(checkpoint)}),
    ]
    launch([*FSDP, str(Path(__file__).parent / "fsdp_on_cpu.py"), *recipes])

    assert_same_weights(one_process, tmp_path / "fsdp", atol=2e-5)
    assert any("pytorch_model_fsdp" in path.name for path in checkpoint.iterdir()), "it did not run under FSDP"
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert loaded.config.architectures == ["DeltaLlavaForConditionalGeneration"]
    assert_same_weights(tmp_path / "fsdp", tmp_path / "resumed", atol=1e-6)

    lora = train(recipe(folder, tmp_path / "one-lora", 4, **LORA_RUN))
    assert_same_weights(lora, tmp_path / "lora", atol=2e-5)
    before, after = weights(folder / "model"), weights(lora)
    for part in ("embed_tokens", "language_model.layers", "vision_tower", "multi_modal_projector"):
        assert any(part in name and not torch.equal(before[name], after[name]) for name in before), part
