"""Checkpoints of the same layout whose projector is another one, recognised by names and shapes."""

import re
from collections.abc import Mapping

from .checkpoint_reader import LazyTensor
from .errors import listed
from .key_map import SOURCE_PROJECTOR


# Every delta projector has it, whatever its ablations and its rank.
_DELTA = "q_proj_1.shared_weight.weight"
_LAYER = re.compile(r"(?:(\d+)\.)?weight")
_TRAIN = "a Delta-LLaVA can be trained on its vision tower and language model (`delta-llava train`, docs/training.md)"


def describe_other_projector(tensors: Mapping[str, LazyTensor], name: str) -> str | None:
    """A sentence on what the projector of a checkpoint is and what can be done with it; None for a delta projector.

    Args:
        tensors: of the checkpoint, by the names in its files.
        name: of the checkpoint, for the sentence.
    """
    shapes = {n.removeprefix(SOURCE_PROJECTOR): t.shape for n, t in tensors.items() if n.startswith(SOURCE_PROJECTOR)}
    if any(_is_delta(inner) for inner in shapes):
        return None
    if not shapes:
        return _without_projector(tensors, name)
    layers = _linear_layers(shapes)
    if layers:
        what = "a single linear layer (linear)" if len(layers) == 1 else f"LLaVA's own MLP (mlp{len(layers)}x_gelu)"
        widths = " -> ".join(str(width) for width in [layers[0][1], *(out for out, _ in layers)])
        return (
            f"The projector of {name} is {what}, {widths} wide, and not a delta projector, whatever its config says: it "
            f"runs in LLaVA's code, or in transformers after its convert_llava_weights_to_hf.py; {_TRAIN}."
        )
    if "q_proj_1.weight" in shapes or {"ln_q_1.weight", "ln_k_1.weight"} & shapes.keys():
        return (
            f"The projector of {name} is TokenPacker's, with plain query, key and value projections, and not a delta "
            f"projector: it runs in TokenPacker's code; {_TRAIN}."
        )
    return (
        f"The projector of {name} is not a delta projector, and not one that is known here; its tensors are "
        f"{listed(shapes, limit=6)}; {_TRAIN}."
    )


def _is_delta(inner: str) -> bool:
    """Whether a tensor of the projector has a name that only delta projectors have."""
    return inner == _DELTA or inner.startswith("combined_block.") or inner.endswith(("_proj_1.U", "_proj_1.V"))


def _linear_layers(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """(out, in) of the linear layers, where the projector is made of nothing else."""
    layers: dict[int, tuple[int, ...]] = {}
    for inner, shape in shapes.items():
        match = _LAYER.fullmatch(inner)
        if match and len(shape) == 2:
            layers[int(match[1] or 0)] = shape
        elif not re.fullmatch(r"(\d+\.)?bias", inner):
            return []
    return [layers[number] for number in sorted(layers)]


def _without_projector(tensors: Mapping[str, LazyTensor], name: str) -> str:
    if any("multi_modal_projector.q_proj." in tensor for tensor in tensors):
        return f"{name} is a Delta-LLaVA repo already, which needs no conversion; `delta-llava inspect` looks into it."
    if any("multi_modal_projector." in tensor for tensor in tensors):
        return (
            f"{name} is a model in the layout of transformers, which needs no conversion: AutoModelForImageTextToText loads "
            f"it; {_TRAIN}."
        )
    return (
        f"{name} has no projector (no tensor is called {SOURCE_PROJECTOR}...); give the folder that has the trained projector, "
        "with its mm_projector.bin, and this one as its base model (--base-model)."
    )
