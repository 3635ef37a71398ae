"""Figures of the analyses."""

import base64
import bisect
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from math import isqrt
from pathlib import Path

import numpy as np
from jinja2 import Environment
from PIL import Image, ImageDraw, ImageFont

from ..processing import DeltaLlavaProcessor
from ..processing.image_utils_delta_llava import levels_of, to_rgb
from .budgets import BudgetComparison, BudgetRun
from .explain import Explanation


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


PAPER, INK, FAINT_INK, LINE = "#ffffff", "#1b1f24", "#6a7380", "#e3e6ea"


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """
    Refuse a file that could not be written, before anything is computed.

    Raises:
        ValueError: its name ends in none of `suffixes`, its folder does not exist or may not be written to, or it is a
            folder itself.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: name a file that ends in {' or '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} may not be written.")


def write_picture(picture: Image.Image, path: Path) -> None:
    """
    Write a picture in the format that the name says: all of it, or nothing.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        picture.save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def tower_view(image: Image.Image, processor: DeltaLlavaProcessor) -> Image.Image:
    """The square that the vision tower sees, padded or cut, as a picture of as many pixels as it has there."""
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    levels = levels_of(pixels, lambda name: getattr(processor.image_processor, name, None))
    return Image.fromarray(levels.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of many scripts where there is one, or Pillow's own."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def wrap(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Lines of `text` of at most `width` pixels: broken at blanks, or anywhere in a word that is longer."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if draw.textlength(longer, font) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while len(word) > 1 and draw.textlength(word, font) > width:
                lengths = range(1, min(len(word), 500))
                fits = (
                    bisect.bisect_right(lengths, width, key=lambda n: math.ceil(draw.textlength(word[:n], font))) or 1
                )
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    return lines


SUFFIXES = (".html", ".png")
MOSAIC = (
    "Each mosaic has one tile per visual token, in the mean colour of what it covers; it is not what the model sees."
)
# The parts of a time bar; the mark of what auto picks.
BARS = {"vision tower": "#9db7d5", "rest until the first token": "#3f76b5", "rest of the answer": "#e0a458"}
PICKED = "#2f7d4f"
WIDTH, MARGIN, TILE, BAR = 1200, 36, 96, 300


def write_comparison(
    comparison: BudgetComparison, image: Image.Image, processor: DeltaLlavaProcessor, model: str, path: Path
) -> None:
    """
    Write a page (.html, whole in one file) or a picture (.png) of a comparison.

    Args:
        comparison: of `compare_budgets`.
        image: what was asked about.
        processor: the model's, which says how the picture was padded or cut.
        model: name to show.
        path: file to write, replaced if it exists.

    Raises:
        ValueError: the file is neither .html nor .png, or its folder does not exist.
    """
    check_output(path, SUFFIXES)
    view = tower_view(image, processor)
    if path.suffix.lower() == ".html":
        path.write_text(_page(comparison, view, model), encoding="utf-8")
    else:
        write_picture(_draw(comparison, view, model), path)


def mosaic(view: Image.Image, visual_tokens: int, side: int) -> Image.Image:
    """`view` in one tile per visual token, `side` pixels wide."""
    grid = isqrt(visual_tokens)
    tiles = view.resize((grid, grid), Image.Resampling.BOX)
    return tiles.resize((side, side), Image.Resampling.NEAREST)


def _shares(run: BudgetRun) -> list[float]:
    """Milliseconds of the three parts of a run, in the order of `BARS`."""
    return [run.tower_ms, run.first_token_ms - run.tower_ms, run.total_ms - run.first_token_ms]


def _page(comparison: BudgetComparison, view: Image.Image, model: str) -> str:
    def address(image: Image.Image) -> str:
        file = io.BytesIO()
        image.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    source = (files(__package__) / "budgets.html.jinja").read_text(encoding="utf-8")
    longest = max(run.total_ms for run in comparison.runs)
    rows = [
        {
            "run": run,
            "mosaic": address(mosaic(view, run.visual_tokens, 2 * TILE)),
            "bars": [(colour, 100 * ms / longest) for colour, ms in zip(BARS.values(), _shares(run))],
        }
        for run in comparison.runs
    ]
    shown = {"comparison": comparison, "rows": rows, "view": address(view), "model": model, "legend": BARS}
    page = Environment(autoescape=True).from_string(source)
    return page.render(**shown, notes=_notes(comparison), count=_count)


def _draw(comparison: BudgetComparison, view: Image.Image, model: str) -> Image.Image:
    """The same as a picture: measured on a scrap first, as its height follows from the answers."""
    scrap = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    body, small, large = font(17), font(13), font(24)
    text_left = MARGIN + TILE + 24 + 110 + BAR + 24
    answers = [wrap(scrap, run.answer or "(nothing)", body, WIDTH - MARGIN - text_left) for run in comparison.runs]
    heights = [max(TILE, 24 * len(lines)) + 24 for lines in answers]
    head = wrap(scrap, comparison.prompt, large, WIDTH - 3 * MARGIN - 2 * TILE)
    top = MARGIN + max(2 * TILE, 34 * len(head) + 60) + 28
    notes = [line for text in _notes(comparison) for line in wrap(scrap, text, small, WIDTH - 2 * MARGIN)]
    page = Image.new("RGB", (WIDTH, top + sum(heights) + 20 * len(notes) + 60 + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)

    page.paste(view.resize((2 * TILE, 2 * TILE), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    left = 2 * MARGIN + 2 * TILE
    draw.text((left, MARGIN), model, FAINT_INK, small)
    for index, line in enumerate(head):
        draw.text((left, MARGIN + 26 + 34 * index), line, INK, large)
    longest = max(run.total_ms for run in comparison.runs)
    for run, lines, height in zip(comparison.runs, answers, heights):
        draw.line((MARGIN, top, WIDTH - MARGIN, top), LINE)
        page.paste(mosaic(view, run.visual_tokens, TILE), (MARGIN, top + 12))
        left = MARGIN + TILE + 24
        draw.text((left, top + 12), str(run.visual_tokens), INK, large)
        draw.text((left, top + 44), "visual tokens", FAINT_INK, small)
        draw.text((left, top + 64), f"loss {run.loss:.2f}", FAINT_INK, small)
        if run.picked:
            draw.text((left, top + 84), "picked by auto", PICKED, small)
        left = text_left - 24 - BAR
        at = float(left)
        for colour, ms in zip(BARS.values(), _shares(run)):
            width = (BAR - 20) * ms / longest
            draw.rectangle((at, top + 20, at + width, top + 36), colour)
            at += width
        draw.text((left, top + 46), f"first token {run.first_token_ms:,.1f} ms", INK, small)
        draw.text(
            (left, top + 66), f"{_count(run.answer_tokens, 'token')} in all {run.total_ms:,.1f} ms", FAINT_INK, small
        )
        for index, line in enumerate(lines):
            draw.text((text_left, top + 12 + 24 * index), line, INK, body)
        top += height
    draw.line((MARGIN, top, WIDTH - MARGIN, top), LINE)
    at = MARGIN
    for name, colour in BARS.items():
        draw.rectangle((at, top + 20, at + 12, top + 32), colour)
        draw.text((at + 20, top + 18), name, FAINT_INK, small)
        at += 50 + int(draw.textlength(name, small))
    for index, line in enumerate(notes):
        draw.text((MARGIN, top + 48 + 20 * index), line, FAINT_INK, small)
    return page


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _notes(comparison: BudgetComparison) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    where = f"{comparison.device}, {comparison.dtype}, {_count(comparison.threads, 'thread')}, {versions}."
    return [f"{comparison.times} {where}", f"{MOSAIC} Auto may lose {comparison.auto_max_loss:g}."]


EXPLAIN_SUFFIXES = (".png", ".jpg", ".jpeg")
# Colours of the heat from 0 to 1, from dark to bright and through hues that the colour-blind can tell apart.
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float)
# Share of the picture that shows through where there is no heat, and where there is most.
THROUGH = (0.6, 0.2)
PANEL, GAP, MARGIN, PANELS_PER_ROW = 336, 20, 28, 5
NOTES = {
    "visual_tokens": "Heat at the visual tokens, one cell each",
    "patches": "Heat at the patches that the vision tower sees",
}


def draw_heat(picture: Image.Image, explanation: Explanation, processor: DeltaLlavaProcessor) -> Image.Image:
    """
    The picture as the vision tower sees it, padded or cut to a square, with the heat of `explanation` over it.

    The heat is interpolated between the middles of its cells. A small square is enlarged to 336 pixels.

    Raises:
        ValueError: the picture cannot be used.
    """
    view = tower_view(picture, processor)
    if view.width < PANEL:
        view = view.resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    cells = Image.fromarray(explanation.heat.numpy())
    heat = np.asarray(cells.resize(view.size, Image.Resampling.BILINEAR)).clip(0, 1)[..., None]
    steps = np.linspace(0, 1, len(HEAT))
    colours = np.concatenate([np.interp(heat, steps, channel) for channel in HEAT.T], axis=-1)
    through = THROUGH[0] + (THROUGH[1] - THROUGH[0]) * heat
    mixed = np.asarray(view, float) * through + colours * (1 - through)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def draw_explanations(
    picture: Image.Image,
    explanations: Sequence[Explanation],
    processor: DeltaLlavaProcessor,
    prompt: str,
    on: str = "visual_tokens",
) -> Image.Image:
    """
    The picture, then the heat of every explanation with its answer, side by side under the prompt.

    Raises:
        ValueError: the picture cannot be used.
    """
    scrap = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    body, small, large = font(17), font(13), font(22)
    panels = [(_fit(to_rgb(picture, 0)), "the picture", "", "")]
    for found in explanations:
        count = f"{found.num_visual_tokens} visual token{'s' * (found.num_visual_tokens != 1)}"
        none = "" if found.heat.any() else ": nothing speaks for it"
        heat = _fit(draw_heat(picture, found, processor))
        panels.append((heat, count, found.answer or "(nothing)", f"heat of “{found.token}”{none}"))
    columns = min(len(panels), PANELS_PER_ROW)
    width = 2 * MARGIN + columns * PANEL + (columns - 1) * GAP
    head = wrap(scrap, prompt, large, width - 2 * MARGIN)
    notes = wrap(scrap, f"{NOTES[on]}. Every panel has its own scale, from none to most.", small, width - 2 * MARGIN)
    texts = [
        [wrap(scrap, text, letters, PANEL) for text, letters in ((panel[2], body), (panel[3], small))]
        for panel in panels
    ]
    heights = [PANEL + 40 + 24 * len(answer) + 20 * len(token) + GAP for answer, token in texts]
    rows = [max(heights[start : start + columns]) for start in range(0, len(panels), columns)]
    page = Image.new("RGB", (width, 2 * MARGIN + 32 * len(head) + 12 + sum(rows) + 20 * len(notes)), PAPER)
    draw = ImageDraw.Draw(page)
    for index, line in enumerate(head):
        draw.text((MARGIN, MARGIN + 32 * index), line, INK, large)
    for index, ((shown, title, *_), (answer, token)) in enumerate(zip(panels, texts)):
        left = MARGIN + index % columns * (PANEL + GAP)
        top = MARGIN + 32 * len(head) + 12 + sum(rows[: index // columns])
        page.paste(shown, (left, top + (PANEL - shown.height) // 2))
        draw.text((left, top + PANEL + 8), title, FAINT_INK, small)
        for line_number, line in enumerate(answer):
            draw.text((left, top + PANEL + 30 + 24 * line_number), line, INK, body)
        for line_number, line in enumerate(token):
            draw.text((left, top + PANEL + 34 + 24 * len(answer) + 20 * line_number), line, FAINT_INK, small)
    for index, line in enumerate(notes):
        draw.text((MARGIN, page.height - MARGIN - 20 * (len(notes) - index)), line, FAINT_INK, small)
    return page


def _fit(picture: Image.Image) -> Image.Image:
    """As large as a panel holds."""
    scale = PANEL / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    # The gap spares a very long image weights for each of its pixels; to others it makes no difference that one sees.
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=4.0)
