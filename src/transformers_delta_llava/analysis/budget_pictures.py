"""Answers and times at every budget as a web page or as a picture."""

import base64
import io
from importlib.resources import files
from math import isqrt
from pathlib import Path

from jinja2 import Environment
from PIL import Image, ImageDraw

from ..processing import DeltaLlavaProcessor
from .budgets import BudgetComparison, BudgetRun
from .drawing import FAINT_INK, INK, LINE, PAPER, check_output, font, tower_view, wrap, write_picture


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
