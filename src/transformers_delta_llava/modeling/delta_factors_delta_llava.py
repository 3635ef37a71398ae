"""What is done to the factors of deltas: which a projector has, whether others fit, where their values are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .projector_delta_llava import DeltaProjection


FACTORS = ("delta_u", "delta_v")


def applied_updates(config: Any) -> dict[str, list[tuple[int, ...]]]:
    """Names of the projector's DeltaProjections, and the updates that each is called with.

    One update of the `"paper"` layout's queries is a sum over the levels (equation 4), hence an index without a level.
    """
    levels = len(config.vision_feature_levels)
    if config.projector_layout == "released":
        return {name: [()] for name in ("q_proj", "k_proj", "v_proj")}
    if config.delta_sharing == "all":
        return {"qkv_proj": [(0,), *((role, level) for role in (1, 2) for level in range(levels))]}
    each: list[tuple[int, ...]] = [(level,) for level in range(levels)]
    return {"q_proj": [()], "k_proj": each, "v_proj": each}


def check_deltas(
    state_dict: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    where: str = "",
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], int]:
    """Deltas by projection, and the one rank that all have.

    Args:
        state_dict: tensors by name; names may have what leads to the projector before them.
        shapes: of `delta_u` and `delta_v` by projection, whatever their rank.
        where: put before error messages.

    Raises:
        ValueError: on names that are missing, unknown or given twice, and on other shapes or dtypes.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        short = name.rpartition("multi_modal_projector.")[2]
        if short in tensors:
            raise ValueError(f"{where}several tensors claim to be {short}.")
        tensors[short] = tensor
    expected = {f"{name}.{factor}" for name in shapes for factor in FACTORS}
    if extra := sorted(tensors.keys() - expected):
        raise ValueError(f"{where}{', '.join(extra)}: this projector has no such deltas.")
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"{where}there is no {', '.join(missing)}.")
    rank = tensors[min(expected)].shape[-1] if tensors[min(expected)].dim() else 0
    found = {}
    for name, (shape_u, shape_v) in shapes.items():
        delta_u, delta_v = (tensors[f"{name}.{factor}"] for factor in FACTORS)
        for factor, tensor, shape in zip(FACTORS, (delta_u, delta_v), shapes_at(shape_u, shape_v, rank)):
            if tuple(tensor.shape) != shape or not rank or not tensor.is_floating_point():
                raise ValueError(
                    f"{where}{name}.{factor} is {tuple(tensor.shape)} of {tensor.dtype}, and should be {shape} of a "
                    "float dtype."
                )
        found[name] = (delta_u, delta_v)
    return found, rank


def trimmed(delta_u: torch.Tensor, delta_v: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `rank` columns and rows of the factors, as views."""
    return delta_u[..., :rank], delta_v[..., :rank, :]


def shapes_at(shape_u: Sequence[int], shape_v: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of factors like these, with another rank."""
    return (*shape_u[:-1], rank), (*shape_v[:-2], rank, shape_v[-1])


def factors_of(projection: DeltaProjection, write: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors, as `resident` finds them."""
    return resident(projection, "delta_u", write), resident(projection, "delta_v", write)


def fill(targets: tuple[torch.Tensor, torch.Tensor], factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write factors into tensors of the same or a higher rank, and zeros into the rest of these."""
    rank = factors[0].shape[-1]
    for part, factor in zip(trimmed(*targets, rank), factors):
        part.copy_(factor)
    targets[0][..., rank:].zero_()
    targets[1][..., rank:, :].zero_()


def resident(module: nn.Module, name: str, write: bool = False) -> torch.Tensor:
    """A parameter, or what accelerate keeps of it in the CPU's memory or on disk while the module does not run.

    Raises:
        ValueError: if it has no values anywhere, or is to be written and lies on disk.
    """
    tensor = getattr(module, name)
    if tensor.device.type != "meta":
        return tensor
    stored = next((hook.weights_map for hook in hooks(module) if getattr(hook, "weights_map", None)), None)
    if stored is None:
        raise ValueError(f"{name} is on the meta device: load the model's weights before its deltas.")
    if write and stored[name] is not stored[name]:  # read from disk anew each time
        raise ValueError(
            "The projector is offloaded to disk, where deltas cannot be changed; keep it in memory: give "
            "model.multi_modal_projector a device of its own in device_map."
        )
    return stored[name]


def hooks(module: nn.Module) -> list[Any]:
    """The hooks by which accelerate moves a module's inputs and parameters."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))
