"""Checkpoints: Hub folders that `from_pretrained` loads, and that a run goes on from to the last bit."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..modeling import DeltaLlavaForConditionalGeneration
from .errors import RecipeError


def save_hub_folder(
    model: Any,
    state_dict: dict[str, torch.Tensor],
    processor: Any,
    folder: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """
    Write config, code, weights and processor.

    Args:
        model: for its config and generation config; a wrapper around it (DDP, FSDP) does not matter.
        state_dict: the weights, whole.
        processor: a `DeltaLlavaProcessor`.
        folder: is made where it does not exist.
        dtype: of all weights; by default each stays as it is.
    """
    if dtype is not None:
        state_dict = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state_dict.items()}
    config = model.config
    for head, embeddings in DeltaLlavaForConditionalGeneration._tied_weights_keys.items():
        one, other = state_dict.get(head), state_dict.get(embeddings)
        tied = config.text_config.tie_word_embeddings or config.tie_word_embeddings
        if tied and one is not None and other is not None and not torch.equal(one, other):
            # One of the two was trained alone, by LoRA's `modules_to_save`; tied, the other would replace it.
            config = copy.deepcopy(config)
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    # An empty model of the plain class: FSDP and PEFT change the class, and so what save_pretrained writes.
    with torch.device("meta"):
        shell = DeltaLlavaForConditionalGeneration(config)
    shell.to(dtype or torch.float32)
    shell.generation_config = model.generation_config
    shell.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """
    Put a checkpoint's weights into a model, each in the model's own dtype; all of them must be there.

    transformers' Trainer would leave out what has another name in memory than in the file (the vision tower).

    Raises:
        RecipeError: a weight is missing, or too many are there.
    """
    targets = dict(model.state_dict())
    # Tied weights are stored once; the other name stays as it is, because it is the same tensor.
    missing = {name: tensor.data_ptr() for name, tensor in targets.items()}
    for stored, tensor in _read(Path(folder)):
        name = stored if stored in targets else stored.replace(".vision_tower.vision_model.", ".vision_tower.")
        if name not in targets:
            raise RecipeError(f"{folder} holds {stored}, which this model does not have: resume with the same recipe.")
        if targets[name].shape != tensor.shape:
            raise RecipeError(
                f"{folder}: {stored} is {tuple(tensor.shape)}, this model's {tuple(targets[name].shape)}."
            )
        targets[name].copy_(tensor)
        place = targets[name].data_ptr()
        missing = {other: address for other, address in missing.items() if address != place}
    if missing:
        raise RecipeError(f"{folder} holds no {next(iter(missing))}: the checkpoint is not whole.")


def _read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    for file in files:
        with safe_open(folder / file, framework="pt") as weights:
            for name in weights.keys():
                yield name, weights.get_tensor(name)


def check_resumable(folder: str | Path) -> None:
    """
    Refuse a checkpoint that transformers would go on from with a new optimizer, schedule or random numbers.

    Raises:
        RecipeError: it lacks one of them.
    """
    folder = Path(folder)
    parts = {  # written by transformers, accelerate's FSDP, DeepSpeed
        "trainer's state": ("trainer_state.json",),
        "optimizer's state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
        "schedule": ("scheduler.pt", "global_step*"),
        "random numbers": ("rng_state*.pth",),
    }
    for part, patterns in parts.items():
        if not any(True for pattern in patterns for _ in folder.glob(pattern)):
            raise RecipeError(
                f"{folder} lacks the {part}, so the run cannot go on from it (arguments.save_only_model leaves it out): "
                "begin a new run with it as model.path, in another output_dir."
            )


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-N` in a folder that was written to its end."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    # The trainer's state is written last.
    whole = [path for path in folders if (path / "trainer_state.json").is_file()]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
