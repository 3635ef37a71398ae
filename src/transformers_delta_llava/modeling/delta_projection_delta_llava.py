"""DeltaProjection, a base matrix plus low-rank updates: the layer, which of them a projector has, and their factors.

Shapes: r is the rank. The factors of one update are `delta_u` (in, r) and `delta_v` (r, out); several updates of one base
are stacked along leading axes.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN


FACTORS = ("delta_u", "delta_v")
Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]
# Index into the stack of updates of one projection. An index with fewer entries than the stack has axes means the sum of
# all updates below it.
Update: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class ProjectionSpec:
    """Sizes of one DeltaProjection, and the updates that the projector applies.

    Attributes:
        in_features, out_features: of the base.
        stack: leading axes of the factors: `()` for one update, `(levels,)`, or `(3, levels)` for queries, keys and values.
        updates: what the projection is called with. The last index is the level.
    """

    in_features: int
    out_features: int
    stack: tuple[int, ...] = ()
    updates: tuple[Update, ...] = ((),)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `delta_u` and `delta_v` at this rank."""
        return (*self.stack, self.in_features, rank), (*self.stack, rank, self.out_features)

    def num_summed(self, update: Update) -> int:
        """How many updates of the stack `update` adds up."""
        return math.prod(self.stack[len(update) :])


def projection_specs(layout: str, sharing: str, num_levels: int, width: int) -> dict[str, ProjectionSpec]:
    """The DeltaProjections of a projector, by name.

    Args:
        layout: `projector_layout` of the config.
        sharing: `delta_sharing` of the config.
        num_levels: entries of `vision_feature_levels`.
        width: hidden size of the vision tower.
    """
    if layout == "released":  # keys and values read all levels side by side
        wide = ProjectionSpec(num_levels * width, width)
        return {"query": ProjectionSpec(width, width), "key": wide, "value": wide}
    levels = range(num_levels)
    # The query has no level axis in equation (4), so its updates add up.
    if sharing == "all":
        updates = ((0,), *((role, level) for role in (1, 2) for level in levels))
        return {"qkv": ProjectionSpec(width, width, (3, num_levels), updates)}
    by_level = ProjectionSpec(width, width, (num_levels,), tuple((level,) for level in levels))
    return {"query": ProjectionSpec(width, width, (num_levels,)), "key": by_level, "value": by_level}


class DeltaProjection(nn.Module):
    """A base matrix plus low-rank updates: `x @ (weight + (delta_u @ delta_v).T).T`, equation (4).

    The product `delta_u @ delta_v` is never formed: `x @ delta_u @ delta_v` costs less at these ranks.

    With `hidden_act` the map is followed by that activation and a LayerNorm, as in the released code; the paper has
    neither.

    Parameters: `weight` (out, in), `delta_u` (*stack, in, rank), `delta_v` (*stack, rank, out); the last two are `None`
    when `rank` is 0 (the ablation "No DeltaProj").

    Besides the deltas in use a projection can hold others by name, and the sums of base and update ("merged"); the
    models' `load_deltas`, `set_deltas` and `merge_deltas` see to that. Neither is in the state dict.
    """

    delta_u: nn.Parameter | None
    delta_v: nn.Parameter | None
    merged_weights: torch.Tensor | None

    def __init__(self, spec: ProjectionSpec, rank: int, hidden_act: str | None = None):
        super().__init__()
        self.spec = spec
        # Raw parameters, not nn.Linear: engines and quantisers replace every nn.Linear.
        self.weight = nn.Parameter(torch.empty(spec.out_features, spec.in_features))
        for name, shape in zip(FACTORS, spec.factor_shapes(rank)):
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if rank else None)
        self.act = ACT2FN[hidden_act] if hidden_act else nn.Identity()
        self.norm = nn.LayerNorm(spec.out_features, eps=1e-6) if hidden_act else nn.Identity()
        # All sets of deltas in the order of loading, each at its own rank; the active one is in the parameters.
        self.delta_sets: dict[str, Factors | None] = {"default": None}
        self.active_deltas, self.active_rank = "default", rank
        self.deltas_enabled = True
        self.register_buffer("merged_weights", None, persistent=False)
        self.register_load_state_dict_pre_hook(_unmerge)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal base, Xavier-uniform factors, as in the released code: the update does not start at 0."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        for factor in (self.delta_u, self.delta_v):
            if factor is not None:
                init_factor(factor)

    def forward(self, hidden_states: torch.Tensor, update: Update = ()) -> torch.Tensor:
        """(..., in) to (..., out), by the base and one update of the stack."""
        weight, factors = self.operands(update)
        projected = F.linear(hidden_states, weight)
        if factors is not None:
            projected = projected + hidden_states @ factors[0] @ factors[1]
        return self.norm(self.act(projected))

    def operands(self, update: Update = ()) -> tuple[torch.Tensor, Factors | None]:
        """What the input is multiplied with: the base and the factors (in, r) and (r, out), or a merged sum alone."""
        if self.delta_u is None or self.delta_v is None or not self.deltas_enabled:
            return self.weight, None
        if self.merged_weights is not None:
            return self.merged_weights[self.spec.updates.index(update)], None
        return self.weight, pick_update(self.delta_u, self.delta_v, update)

    def get_delta_weight(self, update: Update = ()) -> torch.Tensor:
        """What `update` adds to `weight`: (out, in), in float32, as a new tensor.

        Raises:
            ValueError: if there are no deltas.
        """
        if self.delta_u is None or self.delta_v is None:
            raise ValueError("use_delta_projection=False: this projection has no deltas.")
        return delta_weight(self.delta_u.detach(), self.delta_v.detach(), update)

    @property
    def is_merged(self) -> bool:
        """Whether the forward pass uses sums of base and update that were computed ahead."""
        return self.merged_weights is not None

    def unmerge(self) -> None:
        """Forget the sums. The parameters were never touched, so there is nothing to restore."""
        self.merged_weights = None

    def train(self, mode: bool = True) -> "DeltaProjection":
        """As in PyTorch; the sums would not follow what training does to the parameters, so they are forgotten."""
        if mode and self.is_merged:
            warnings.warn("Merged deltas cannot be trained: they are unmerged.", stacklevel=2)
            self.unmerge()
        return super().train(mode)


def _unmerge(projection: DeltaProjection, *args: Any) -> None:
    """Before weights are loaded: the sums would not follow them."""
    projection.unmerge()


class MemoryProjection(DeltaProjection):
    """A DeltaProjection of all levels side by side. They may come one by one: then the products with each add up."""

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        """Tensors (..., width), whose widths add up to in, to (..., out); more than one only without gradients."""
        if len(levels) == 1:
            return super().forward(levels[0])
        first, *others = (level.flatten(0, -2) for level in levels)
        widths = [level.shape[-1] for level in levels]
        base, factors = self.operands()
        first_weight, *weights = base.split(widths, dim=1)
        projected = F.linear(first, first_weight)
        dtype = projected.dtype  # autocast has chosen it, and leaves what is done in place alone
        for level, weight in zip(others, weights):
            projected.addmm_(level.to(dtype), weight.T.to(dtype))
        if factors is not None:
            first_u, *others_u = factors[0].split(widths)
            reduced = first @ first_u
            for level, delta_u in zip(others, others_u):
                reduced.addmm_(level.to(dtype), delta_u.to(dtype))
            projected = projected.addmm_(reduced, factors[1].to(dtype))
        return self.norm(self.act(projected)).unflatten(0, levels[0].shape[:-1])


def pick_update(delta_u: torch.Tensor, delta_v: torch.Tensor, update: Update) -> Factors:
    """The factors (in, r) and (r, out) of one update; where `update` leaves several, those of their sum."""
    delta_u, delta_v = delta_u[update], delta_v[update]
    if delta_u.dim() == 3:  # a sum of rank-r updates is one update of rank L * r
        delta_u, delta_v = delta_u.transpose(0, 1).flatten(1), delta_v.flatten(0, 1)
    return delta_u, delta_v


def delta_weight(delta_u: torch.Tensor, delta_v: torch.Tensor, update: Update = ()) -> torch.Tensor:
    """(out, in), in float32: what one update adds to the base."""
    delta_u, delta_v = pick_update(delta_u.float(), delta_v.float(), update)
    return (delta_u @ delta_v).T


def init_factor(factor: torch.Tensor) -> None:
    """Xavier-uniform, update by update."""
    bound = math.sqrt(6 / sum(factor.shape[-2:]))
    nn.init.uniform_(factor, -bound, bound)


def truncate(delta_u: torch.Tensor, delta_v: torch.Tensor, rank: int) -> Factors:
    """The first `rank` columns and rows of the factors, as views."""
    return delta_u[..., :rank], delta_v[..., :rank, :]


def copy_factors(source: Factors, target: Factors) -> None:
    """Write factors into tensors of the same or a higher rank, and zeros into the rest of these."""
    rank = source[0].shape[-1]
    for part, factor in zip(truncate(*target, rank), source):
        part.copy_(factor)
    target[0][..., rank:].zero_()
    target[1][..., rank:, :].zero_()


def check_deltas(
    state_dict: Mapping[str, torch.Tensor], specs: Mapping[str, ProjectionSpec], where: str = ""
) -> tuple[dict[str, Factors], int]:
    """Deltas by projection, and the one rank that all have.

    Args:
        state_dict: tensors by name; names may have what leads to the projector before them.
        specs: of `projection_specs`.
        where: put before error messages.

    Raises:
        ValueError: on names that are missing, unknown or given twice, and on other shapes or dtypes.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        short = name.rpartition("multi_modal_projector.")[2]
        if short in tensors:
            raise ValueError(f"{where}{short} is given twice.")
        tensors[short] = tensor
    expected = {f"{name}.{factor}" for name in specs for factor in FACTORS}
    if unexpected := sorted(tensors.keys() - expected):
        raise ValueError(f"{where}{', '.join(unexpected)}: this projector has no such deltas.")
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"{where}there is no {', '.join(missing)}.")
    first = tensors[min(expected)]
    rank = first.shape[-1] if first.dim() else 0
    for name, spec in specs.items():
        for factor, shape in zip(FACTORS, spec.factor_shapes(rank)):
            tensor = tensors[f"{name}.{factor}"]
            if tuple(tensor.shape) != shape or not rank or not tensor.is_floating_point():
                raise ValueError(
                    f"{where}{name}.{factor} is {tuple(tensor.shape)} of {tensor.dtype}, and should be {shape} of a "
                    "float dtype."
                )
    return {name: (tensors[f"{name}.delta_u"], tensors[f"{name}.delta_v"]) for name in specs}, rank


def materialize(module: nn.Module, name: str, write: bool = False) -> torch.Tensor:
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


def materialize_factors(projection: DeltaProjection, write: bool = False) -> Factors:
    """Both factors, by `materialize`."""
    return materialize(projection, "delta_u", write), materialize(projection, "delta_v", write)


def hooks(module: nn.Module) -> list[Any]:
    """The hooks by which accelerate moves a module's inputs and parameters."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))
