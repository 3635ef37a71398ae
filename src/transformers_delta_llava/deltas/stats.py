"""How large deltas are against their bases, and how they spread over directions."""

from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch

from ..modeling.delta_projection_delta_llava import Update
from .algebra import decompose_product
from .projections import Projections, read_projections


@dataclass(frozen=True)
class DeltaRow:
    """One update, or the part of it that reads one level.

    Attributes:
        projection: `query`, `key`, `value`, or with one base for all, `q`, `k`, `v`.
        level: hidden state of the tower; `None` for all that the projection reads.
        rank: that it was given.
        norm: Frobenius norm of the update.
        base_norm: of the base, or of the base's part for the level; `None` without a base.
        rank_99: lowest rank that keeps 99 % of the squared norm.
        singular_values: of the update, falling, `rank` of them at most.
    """

    projection: str
    level: int | None
    rank: int
    norm: float
    base_norm: float | None
    rank_99: int
    singular_values: list[float]

    @property
    def ratio(self) -> float | None:
        """Norm of the update in units of the base's."""
        return self.norm / self.base_norm if self.base_norm else None


def delta_stats(source: str | Path, base: str | Path | None = None) -> list[DeltaRow]:
    """Statistics by projection and level.

    Args:
        source: folder or Hub id of a delta repo, or of a model with deltas.
        base: of a delta repo, the model that has its bases, to compare norms with.

    Raises:
        ValueError: a source that cannot be used, or a base that does not fit.
    """
    model = read_projections(source)
    bases = model.weights
    if base is not None:
        other = read_projections(base, need_deltas=False)
        if not other.weights:
            raise ValueError(f"{other.name} holds deltas only; the base is a model.")
        bases = other.weights
        for name, (u, v) in model.deltas.items():
            if name not in bases or tuple(bases[name].shape) != (v.shape[-1], u.shape[-2]):
                raise ValueError(f"{other.name} has no base of the shape that {name} of {model.name} needs.")
    rows = []
    for name, update in model.updates():
        (u, v), weight = model.factors(name, update), bases.get(name)
        rows.append(_row(*_label(model, name, update), model.rank, u, v, weight))
        width = model.specs[name].out_features
        if len(u) > width:  # keys and values of the "released" layout read the levels side by side
            weights = repeat(None) if weight is None else weight.split(width, dim=1)
            rows += [
                _row(name, level, model.rank, *part)
                for level, *part in zip(model.levels, u.split(width), repeat(v), weights)
            ]
    return rows


def _label(model: Projections, name: str, update: Update) -> tuple[str, int | None]:
    """Projection and level of an update."""
    if name == "qkv":
        return "qkv"[update[0]], model.levels[update[1]] if len(update) > 1 else None
    return name, model.levels[update[0]] if update else None


def _row(
    projection: str, level: int | None, rank: int, u: torch.Tensor, v: torch.Tensor, weight: torch.Tensor | None
) -> DeltaRow:
    part = decompose_product(u, v)
    norm, base_norm = float(part.values.norm()), None if weight is None else float(weight.double().norm())
    return DeltaRow(projection, level, rank, norm, base_norm, part.rank_for(0.99), part.values.tolist())
