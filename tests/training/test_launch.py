"""Training in two processes, under `torchrun` or sharded as under `accelerate launch`, ends where one process does."""

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
LORA = {"r": 2, "lora_dropout": 0.0, "modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "v_proj"]}
LORA_RUN = {"train": ["projector", "lora"], "lora": LORA, "projector_lr": 5e-4}


def recipe(folder: Path, out: Path, rows: int, arguments: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Three steps with `rows` rows per process."""
    arguments = {"per_device_train_batch_size": rows, "max_steps": 3, "max_grad_norm": 1.0, **(arguments or {})}
    return recipe_for(folder, out, arguments, num_visual_tokens=[9, 4], **changes)


@pytest.fixture(scope="module")
def one_process(folder: Path, tmp_path_factory: Any) -> Path:
    """The result of one process with four rows per step."""
    return train(recipe(folder, tmp_path_factory.mktemp("one"), 4))


def launch(*command: object) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *(p for p in sys.path if p)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]


def write(folder: Path, out: Path, **changes: Any) -> Path:
    """The file of a recipe for each of two processes."""
    file = out.with_suffix(".yaml")
    write_yaml(recipe(folder, out, 2, **changes).to_dict(), file)
    return file


def test_torchrun_with_ddp_ends_where_one_process_does(folder: Path, one_process: Path, tmp_path: Path) -> None:
    torchrun = (
        "torch.distributed.run",
        "--nproc_per_node",
        2,
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
    )
    launch("-m", *torchrun, "-m", "transformers_delta_llava", "train", write(folder, tmp_path / "ddp"))
    assert losses(tmp_path / "ddp") == pytest.approx(losses(one_process), abs=1e-4)
    assert_same_weights(one_process, tmp_path / "ddp", atol=2e-5)


@pytest.fixture(scope="module")
def launched(folder: Path, tmp_path_factory: Any) -> Path:
    """The results of two processes under FSDP2, with two rows per step each."""
    out = tmp_path_factory.mktemp("launched")
    runs: dict[str, dict[str, Any]] = {
        "lora": LORA_RUN,
        "fsdp": {"arguments": {"save_steps": 2}},
        "resumed": {"arguments": {"resume_from_checkpoint": str(out / "fsdp" / "checkpoint-2")}},
    }
    launch(Path(__file__).with_name("run_on_cpus.py"), *(write(folder, out / n, **r) for n, r in runs.items()))
    return out


def test_fsdp2_ends_where_one_process_does_also_when_resumed(one_process: Path, launched: Path) -> None:
    assert_same_weights(one_process, launched / "fsdp", atol=2e-5)
    checkpoint = launched / "fsdp" / "checkpoint-2"
    assert any("pytorch_model_fsdp" in path.name for path in checkpoint.iterdir()), "it did not run under FSDP"
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert loaded.config.architectures == ["DeltaLlavaForConditionalGeneration"]
    assert_same_weights(launched / "fsdp", launched / "resumed", atol=1e-6)


def test_fsdp2_with_lora_ends_where_one_process_does(folder: Path, launched: Path, tmp_path: Path) -> None:
    lora = train(recipe(folder, tmp_path, 4, **LORA_RUN))
    assert_same_weights(lora, launched / "lora", atol=2e-5)
    before, after = weights(folder / "model"), weights(lora)
    for part in ("embed_tokens", "language_model.layers", "vision_tower", "multi_modal_projector"):
        assert any(part in name and not torch.equal(before[name], after[name]) for name in before), part
