"""A plot of accuracy over visual tokens, as an SVG without further packages."""

import math
from pathlib import Path


WIDTH, HEIGHT, LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 860, 420, 60, 40, 520, 320
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e08e0b", "#6a4c93", "#777777", "#00a5a5", "#8c4a2f", "#222222")


def write_plot(points: dict[str, list[tuple[int, float]]], title: str, path: Path) -> None:
    """
    Write lines of percent right over the number of visual tokens (on a logarithmic axis).

    Args:
        points: per line (visual tokens, percent).
        title: above the plot.
        path: of the SVG.
    """
    budgets = sorted({budget for line in points.values() for budget, _ in line})
    lowest = min(value for line in points.values() for _, value in line)
    bottom = max(0, math.floor((lowest - 1) / 5) * 5)
    most = math.log2(max(budgets)) or 1

    def place(budget: int, value: float) -> tuple[float, float]:
        return LEFT + math.log2(budget) / most * PLOT_WIDTH, TOP + (100 - value) / (100 - bottom) * PLOT_HEIGHT

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><text x="{LEFT}" y="22" font-size="15">{title}</text>',
    ]
    for value in range(bottom, 101, 5):
        _, y = place(1, value)
        parts.append(
            f'<path d="M{LEFT} {y:.1f}h{PLOT_WIDTH}" stroke="#ddd"/><text x="{LEFT - 34}" y="{y + 4:.1f}">{value}</text>'
        )
    for budget in budgets:
        x, y = place(budget, bottom)
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 20:.1f}">{budget}</text>')
    parts.append(f'<text x="{LEFT + PLOT_WIDTH / 2 - 50}" y="{TOP + PLOT_HEIGHT + 42}">visual tokens per image</text>')
    for index, (name, line) in enumerate(points.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [place(budget, value) for budget, value in sorted(line)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
        y = TOP + 14 + 22 * index
        parts.append(f'<rect x="{LEFT + PLOT_WIDTH + 30}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + PLOT_WIDTH + 48}" y="{y}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
