"""Two processes that train, side by side or sharded, and one process that sees the same rows in every step."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from tests.training.tiny_run import assert_same_weights, recipe_for, weights
from transformers_delta_llava.training import train
from transformers_delta_llava.training.recipe import write_yaml


ROOT = Path(__file__).parents[2]
LORA = {"r": 2, "lora_dropout": 0.0, "modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"train": ["projector", "lora"], "lora": LORA, "projector_lr": 5e-4},
}


def recipe(folder: Path, out: Path, rows: int, arguments: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Two steps with `rows` rows per process, and a checkpoint after each."""
    arguments = {"per_device_train_batch_size": rows, "max_grad_norm": 1.0, "save_steps": 1, **(arguments or {})}
    return recipe_for(folder, out, arguments, num_visual_tokens=[9, 4], **changes)


def write(folder: Path, out: Path, **changes: Any) -> Path:
    """The file of a recipe for each of two processes."""
    file = out.with_suffix(".yaml")
    write_yaml(recipe(folder, out, 2, **changes).to_dict(), file)
    return file


def train_in_one_process(folder: Path, out: Path) -> Path:
    """`out/full` and `out/lora`: four rows per step."""
    for kind, changes in KINDS.items():
        train(recipe(folder, out / kind, 4, **changes))
    return out


def launch(*command: object, python: object = sys.executable, timeout: int = 300, **environment: str) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *(p for p in sys.path if p and python == sys.executable)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.run(
        [str(python), *map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert process.returncode == 0, process.stderr[-3000:]


def check_strategy(strategy: str, folder: Path, one_process: Path, out: Path, **options: Any) -> None:
    """Train fully and with LoRA, resume both after the first step, and compare all with one process."""
    recipes = []
    for kind, changes in KINDS.items():
        recipes.append(write(folder, out / kind, **changes))
        arguments = {"resume_from_checkpoint": str(out / kind / "checkpoint-1")}
        recipes.append(write(folder, out / f"{kind}-resumed", arguments=arguments, **changes))
    launch(Path(__file__).with_name("run_on_cpus.py"), strategy, *recipes, **options)

    before = weights(folder / "model")
    for kind in KINDS:
        after = weights(out / kind)
        assert_same_weights(one_process / kind, out / kind, atol=2e-5)
        assert_same_weights(out / kind, out / f"{kind}-resumed", atol=1e-6)
        for part in ("embed_tokens", "language_model.layers", "multi_modal_projector"):
            assert any(part in name and not torch.equal(before[name], after[name]) for name in before), part
        AutoModelForImageTextToText.from_pretrained(out / kind)
    checkpoint = out / "full" / "checkpoint-2"
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert loaded.config.architectures == ["DeltaLlavaForConditionalGeneration"]
    assert_same_weights(out / "full", checkpoint, atol=0)
    files = {path.name for path in checkpoint.iterdir()}
    sharded = {"fsdp2": "pytorch_model_fsdp_0", "zero2": "zero_to_fp32.py", "zero3": "zero_to_fp32.py"}
    assert strategy == "ddp" or sharded[strategy] in files, f"it did not run under {strategy}"
