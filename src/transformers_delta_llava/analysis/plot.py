"""Plots as SVG files, without further packages: lines over a number, and stacked bars."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path


COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e08e0b", "#6a4c93", "#777777", "#00a5a5", "#8c4a2f", "#222222")
WIDTH, HEIGHT, LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 860, 420, 70, 40, 540, 320


def line_plot(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x_label: str,
    path: Path,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """
    Write lines with a mark at each point.

    Args:
        lines: per name, its points (x, y).
        title: above the plot.
        x_label: under the plot.
        path: of the SVG.
        log_x, log_y: whether an axis is logarithmic; then all its numbers are positive.
    """
    points = [point for line in lines.values() for point in line]
    xs = sorted({x for x, _ in points})
    to_x = _axis([x for x, _ in points], LEFT, LEFT + PLOT_WIDTH, log_x)
    ticks = _log_ticks([y for _, y in points]) if log_y else _ticks(max(y for _, y in points))
    to_y = _axis(ticks, TOP + PLOT_HEIGHT, TOP, log_y)
    parts = [_grid(ticks, to_y), *(_text(to_x(x), TOP + PLOT_HEIGHT + 20, f"{x:g}", "middle") for x in xs)]
    for index, line in enumerate(lines.values()):
        places = [(to_x(x), to_y(y)) for x, y in sorted(line)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{_colour(index)}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_colour(index)}"/>' for x, y in places]
    _write(path, title, x_label, parts, list(lines))


def bar_plot(bars: Mapping[str, Mapping[str, float]], title: str, x_label: str, path: Path) -> None:
    """
    Write one stacked bar per label, its sum above it.

    Args:
        bars: per label under the bar, its parts and their numbers, from the bottom up; the same parts in every bar.
        title: above the plot.
        x_label: under the labels.
        path: of the SVG.
    """
    ticks = _ticks(max(sum(bar.values()) for bar in bars.values()))
    to_y = _axis(ticks, TOP + PLOT_HEIGHT, TOP, False)
    step = PLOT_WIDTH / len(bars)
    parts = [_grid(ticks, to_y)]
    for position, (label, bar) in enumerate(bars.items()):
        left, height = LEFT + step * (position + 0.15), 0.0
        for index, value in enumerate(bar.values()):
            top, bottom = to_y(height + value), to_y(height)
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{0.7 * step:.1f}" height="{bottom - top:.1f}" '
                f'fill="{_colour(index)}"/>'
            )
            height += value
        middle = left + 0.35 * step
        parts += [_text(middle, to_y(height) - 6, f"{height:.3g}", "middle")]
        parts += [_text(middle, TOP + PLOT_HEIGHT + 20, label, "middle")]
    _write(path, title, x_label, parts, list(next(iter(bars.values()))))


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> Callable[[float], float]:
    scale: Callable[[float], float] = math.log if log else float
    lowest, highest = scale(min(values)), scale(max(values))
    span = highest - lowest or 1.0
    return lambda value: start + (scale(value) - lowest) / span * (end - start)


def _ticks(highest: float) -> list[float]:
    """About five round numbers from 0 to `highest` or just above."""
    highest = highest if highest > 0 else 1.0
    power = 10.0 ** math.floor(math.log10(highest / 5))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit * 6 >= highest)
    return [step * index for index in range(math.ceil(highest / step) + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten around the values."""
    lowest, highest = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [10.0**power for power in range(lowest, max(highest, lowest + 1) + 1)]


def _grid(ticks: Sequence[float], to_y: Callable[[float], float]) -> str:
    lines = [f'<path d="M{LEFT} {to_y(tick):.1f}h{PLOT_WIDTH}" stroke="#ddd"/>' for tick in ticks]
    return "\n".join(lines + [_text(LEFT - 8, to_y(tick) + 4, f"{tick:.4g}", "end") for tick in ticks])


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _write(path: Path, title: str, x_label: str, parts: list[str], names: list[str]) -> None:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    )
    legend = []
    for index, name in enumerate(names):
        x, y = LEFT + PLOT_WIDTH + 24, TOP + 14 + 22 * index
        legend.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{_colour(index)}"/>')
        legend.append(_text(x + 18, y, name))
    labels = [
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        _text(LEFT + PLOT_WIDTH / 2, TOP + PLOT_HEIGHT + 44, x_label, "middle"),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *labels, *parts, *legend, "</svg>"]) + "\n", encoding="utf-8")
