"""How large deltas are against their bases, and how they spread over directions: numbers and a plot."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

from .algebra import decompose_product
from .projections import Projections, read_projections


COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e08e0b", "#6a4c93", "#777777", "#00a5a5", "#8c4a2f", "#222222")


@dataclass(frozen=True)
class DeltaRow:
    """One update, or the part of it that reads one level.

    Attributes:
        projection: `q_proj`, `k_proj`, `v_proj`, or with one base for all, `q`, `k`, `v`.
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
        if model.layout == "released":
            rows.append(_row(name, None, model.rank, u, v, weight))
            levels = len(model.levels) if name != "q_proj" else 1
            if levels > 1:  # the levels are side by side in what the projection reads
                width = u.shape[0] // levels
                parts = weight.split(width, dim=1) if weight is not None else [None] * levels
                rows += [
                    _row(name, level, model.rank, part, v, base_part)
                    for level, part, base_part in zip(model.levels, u.split(width), parts)
                ]
        else:
            rows.append(_row(*_label(model, name, update), model.rank, u, v, weight))
    return rows


def _label(model: Projections, name: str, update: tuple[int, ...]) -> tuple[str, int | None]:
    """Projection and level of an update of the `"paper"` layout."""
    if name == "qkv_proj":
        return "qkv"[update[0]], model.levels[update[1]] if len(update) > 1 else None
    return name, model.levels[update[0]] if update else None


def _row(
    projection: str, level: int | None, rank: int, u: torch.Tensor, v: torch.Tensor, weight: torch.Tensor | None
) -> DeltaRow:
    part = decompose_product(u, v)
    base_norm = None if weight is None else float(weight.double().norm())
    return DeltaRow(
        projection,
        level,
        rank,
        float(part.values.norm()),
        base_norm,
        part.rank_for(0.99),
        part.values.tolist(),
    )


def write_plot(rows: Sequence[DeltaRow], title: str, path: Path) -> None:
    """Write singular values (on a logarithmic axis) and norms against the base as an SVG.

    Args:
        rows: of `delta_stats`.
        title: above the plot.
        path: of the file, which must not exist and ends in `.svg`.

    Raises:
        ValueError: another ending.
        FileExistsError: it exists.
    """
    if path.suffix != ".svg":
        raise ValueError(f"The plot {path.name} would be an SVG; call it {path.stem}.svg.")
    height = max(360, 70 + 20 * len(rows))
    names = [row.projection if row.level is None else f"{row.projection} level {row.level}" for row in rows]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1060 {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="1060" height="{height}" fill="white"/><text x="60" y="22" font-size="15">{escape(title)}</text>',
        *_singular_values(rows),
        *_norms(rows, names),
        "</svg>",
    ]
    with path.open("x", encoding="utf-8") as file:
        file.write("\n".join(parts) + "\n")


def _singular_values(rows: Sequence[DeltaRow]) -> list[str]:
    left, top, width, height = 60, 50, 440, 260
    values = [value for row in rows for value in row.singular_values if value > 0]
    if not values:
        return [f'<text x="{left}" y="{top + 20}">all deltas are zero</text>']
    high = math.ceil(math.log10(max(values)) + 1e-9)
    low = max(min(math.floor(math.log10(min(values))), high - 1), high - 8)
    most = max(len(row.singular_values) for row in rows)

    def place(index: int, value: float) -> str:
        x = left + (index - 1) / max(most - 1, 1) * width
        return f"{x:.1f},{top + (high - max(math.log10(value), low)) / (high - low) * height:.1f}"

    parts = [f'<text x="{left}" y="{top + height + 40}">singular values by index</text>']
    for power in range(low, high + 1):
        y = top + (high - power) / (high - low) * height
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/><text x="12" y="{y + 4:.1f}">1e{power}</text>')
    for index in sorted({1, (most + 1) // 2, most}):
        x = left + (index - 1) / max(most - 1, 1) * width
        parts.append(f'<text x="{x - 4:.1f}" y="{top + height + 18}">{index}</text>')
    for number, row in enumerate(rows):
        points = [place(i, value) for i, value in enumerate(row.singular_values, 1) if value > 0]
        colour, dash = COLOURS[number % len(COLOURS)], ' stroke-dasharray="4 3"' if row.level is not None else ""
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2.5" fill="{colour}"/>' for p in points]
    return parts


def _norms(rows: Sequence[DeltaRow], names: Sequence[str]) -> list[str]:
    left, top, width = 660, 50, 280
    ratios = [row.norm if row.ratio is None else row.ratio for row in rows]
    longest = max(ratios) or 1
    what = "norm of the delta" if rows[0].ratio is None else "norm of the delta in units of its base's"
    parts = [f'<text x="{left}" y="{top - 8}">{what}</text>']
    for number, (name, value) in enumerate(zip(names, ratios)):
        y = top + 20 * number
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<text x="{left - 120}" y="{y + 12}">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{value / longest * width:.1f}" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{left + value / longest * width + 6:.1f}" y="{y + 12}">{value:.3g}</text>')
    return parts
