"""Figures of the benchmarks, drawn as those of the package."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers_delta_llava.analysis.figures import new_figure


def line_plot(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x_label: str,
    path: Path,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Write lines, per name their points (x, y), with a mark at each point; numbers on a logarithmic axis are positive."""
    with new_figure(path, 8.6, 4.2) as figure:
        axes = figure.subplots()
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=name)
        axes.set(title=title, xlabel=x_label, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
        xs = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.4)
        figure.legend(loc="outside right upper", frameon=False)
