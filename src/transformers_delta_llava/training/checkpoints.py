"""Checkpoints and finished models on disk: written as Hub folders, loaded again, checked before a run resumes."""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..modeling import DeltaLlavaForConditionalGeneration
from ..utils.errors import RecipeError, one_line


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
        model: gives config and generation config; it may be wrapped (DDP, FSDP).
        state_dict: all weights.
        processor: a `DeltaLlavaProcessor`.
        folder: created if needed.
        dtype: dtype of all weights; by default each keeps its own.
    """
    if dtype is not None:
        state_dict = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state_dict.items()}
    config = model.config
    for head, embeddings in DeltaLlavaForConditionalGeneration._tied_weights_keys.items():
        one, other = state_dict.get(head), state_dict.get(embeddings)
        tied = config.text_config.tie_word_embeddings or config.tie_word_embeddings
        if tied and one is not None and other is not None and not torch.equal(one, other):
            # LoRA's `modules_to_save` trained one of the two; tied, it would be lost.
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
    Load the weights of a checkpoint into a model, each in the model's own dtype.

    Raises:
        RecipeError: a weight is missing, unknown to the model, or of another shape. transformers' Trainer only warns.
    """
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    missing, unexpected = set(addresses), set[str]()
    for file in sorted(Path(folder).glob("model*.safetensors")):
        try:
            result = model.load_state_dict(load_file(file), strict=False)
        except RuntimeError as error:  # another shape
            raise RecipeError(f"{folder}: {one_line(error)}: resume with the same recipe.") from error
        missing &= set(result.missing_keys)
        unexpected |= set(result.unexpected_keys)
    # Tied weights are stored once.
    loaded = {address for name, address in addresses.items() if name not in missing}
    missing = {name for name in missing if addresses[name] not in loaded}
    if missing or unexpected:
        problem = f"holds no {min(missing)}" if missing else f"holds {min(unexpected)}, which this model does not have"
        raise RecipeError(f"{folder} {problem}: resume with the same recipe, or from another checkpoint.")


def check_resumable(folder: str | Path) -> None:
    """
    Refuse a checkpoint that transformers would resume with a new optimizer, schedule or random number generator.

    Raises:
        RecipeError: the checkpoint lacks the state of one of them.
    """
    folder = Path(folder)
    parts = {  # as written by transformers, accelerate's FSDP, DeepSpeed
        "trainer's state": ("trainer_state.json",),
        "optimizer's state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
        "schedule's state": ("scheduler.pt", "global_step*"),
        "random number generators' state": ("rng_state*.pth",),
    }
    for part, patterns in parts.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise RecipeError(
                f"{folder} lacks the {part}, so the run cannot resume from it (arguments.save_only_model leaves it out): "
                "start a new run with it as model.path, in another output_dir."
            )


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete `checkpoint-N` in a folder."""
    states = Path(output_dir).glob("checkpoint-*/trainer_state.json")  # written last
    steps = [int(number) for state in states if (number := state.parent.name.removeprefix("checkpoint-")).isdigit()]
    return str(Path(output_dir) / f"checkpoint-{max(steps)}") if steps else None


def merge_adapter(model: Any, adapter: str, dtype: torch.dtype | None) -> nn.Module:
    """The base model of a PEFT model, reloaded on the CPU and not quantized, with a saved adapter merged into it."""
    from peft import PeftModel

    config = copy.deepcopy(model.get_base_model().config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    base = DeltaLlavaForConditionalGeneration.from_pretrained(
        config.name_or_path, config=config, dtype=dtype or "auto"
    )
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def replace_files(source: Path, target: Path) -> None:
    """Move everything in `source` to `target`; replaces files of the same name and all weights there."""
    for stale in target.glob("model*.safetensors*"):
        stale.unlink()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        path.replace(target / path.name)


def is_peft(model: Any) -> bool:
    """Whether a model is a `PeftModel`."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")
