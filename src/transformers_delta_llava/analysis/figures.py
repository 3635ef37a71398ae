"""Figures of the analyses, drawn with matplotlib as PNG or SVG, whichever the file's name ends in."""

import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, isqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..deltas import DeltaRow
from ..processing import DeltaLlavaProcessor
from ..processing.image_utils_delta_llava import levels_of, to_rgb
from ..utils.errors import DeltaLlavaError, printable
from .budgets import BudgetComparison
from .explain import Explanation


SUFFIXES = (".png", ".svg")
# Text of an SVG stays text, and the same figure has the same bytes.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "delta-llava", "font.size": 10}
PANEL = 336  # pixels: the side of a saliency map, at least
PANELS_PER_ROW = 5
# Weight of the saliency's colour where there is none, and where there is most.
OPACITY = (0.4, 0.8)
TIMES = {"vision tower": "#9db7d5", "rest until the first token": "#3f76b5", "rest of the answer": "#e0a458"}
MOSAIC = "One tile per visual token, in the mean colour of what it covers; it is not what the model sees."
POSITIONS = {
    "visual_tokens": "Saliency at the visual tokens, one cell each.",
    "patches": "Saliency at the patches that the vision tower sees.",
}


def import_matplotlib() -> Any:
    """The module.

    Raises:
        DeltaLlavaError: it is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise DeltaLlavaError("Figures need matplotlib: pip install 'transformers-delta-llava[plots]'.") from error
    return matplotlib


def check_figure_path(path: Path) -> None:
    """
    Refuse a figure that could not be written, before anything is computed.

    Raises:
        DeltaLlavaError: matplotlib is not installed, the name ends in none of `SUFFIXES`, the folder does not exist or is
            not writable, or the path is a folder.
    """
    import_matplotlib()
    if path.suffix.lower() not in SUFFIXES:
        raise DeltaLlavaError(f"{path}: name a file that ends in {' or '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise DeltaLlavaError(f"{path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise DeltaLlavaError(f"{path}: this is a folder.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DeltaLlavaError(f"{path} is not writable.")


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A `matplotlib.figure.Figure` of so many inches, which is written to `path` at the end: all of it, or nothing.

    Raises:
        DeltaLlavaError: see `check_figure_path`.
        OSError: the file cannot be written; an earlier one is still there.
    """
    check_figure_path(path)
    matplotlib = import_matplotlib()
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks shows as boxes
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        yield figure
        kind = path.suffix[1:].lower()
        try:
            figure.savefig(
                draft,
                format=kind,
                dpi=100,
                bbox_inches="tight",
                pad_inches=0.2,
                metadata={"Date": None} if kind == "svg" else None,
            )
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def bar_plot(bars: Mapping[str, Mapping[str, float]], title: str, x_label: str, path: Path) -> None:
    """
    Write one stacked bar per label, its sum above it.

    Args:
        bars: per label under the bar, its parts and their numbers, from the bottom up; the same parts in every bar.
        title: above the plot.
        x_label: under the labels.
        path: of the figure.
    """
    with new_figure(path, 8.6, 4.2) as figure:
        axes, sums, drawn = figure.subplots(), np.zeros(len(bars)), None
        for part in next(iter(bars.values())):
            values = np.array([bar[part] for bar in bars.values()])
            drawn = axes.bar(list(bars), values, 0.7, bottom=sums, label=part)
            sums = sums + values
        axes.bar_label(drawn, [f"{value:.3g}" for value in sums])
        axes.set(title=title, xlabel=x_label)
        figure.legend(loc="outside right upper", frameon=False)


def plot_delta_stats(rows: Sequence[DeltaRow], title: str, path: Path) -> None:
    """
    Write singular values, on a logarithmic axis, and norms: in units of the base's, where the base is known.

    Args:
        rows: of `delta_stats`.
        title: above the plots.
        path: of the figure.
    """
    names = [row.projection if row.level is None else f"{row.projection} level {row.level}" for row in rows]
    norms = [row.norm if row.ratio is None else row.ratio for row in rows]
    with new_figure(path, 10.6, max(3.6, 1 + 0.25 * len(rows))) as figure:
        left, right = figure.subplots(1, 2)
        bars = right.barh(names, norms, color=[f"C{number % 10}" for number in range(len(rows))])
        right.bar_label(bars, fmt="%.3g", padding=3)
        right.invert_yaxis()
        right.set_title("norm of the delta" if rows[0].ratio is None else "norm of the delta in units of its base's")
        right.margins(x=0.2)
        for row in rows:
            values = [value for value in row.singular_values if value > 0]
            left.plot(range(1, 1 + len(values)), values, "o-" if row.level is None else "o--", markersize=3)
        left.set_title("singular values by index")
        if any(norms):
            left.set_yscale("log")
        else:
            left.text(0.5, 0.5, "all deltas are zero", ha="center", transform=left.transAxes)
        figure.suptitle(_wrap(title, 120))


def tower_view(image: Image.Image, processor: DeltaLlavaProcessor) -> Image.Image:
    """The square that the vision tower sees, padded or cropped, with as many pixels as it has there."""
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    levels = levels_of(pixels, lambda name: getattr(processor.image_processor, name, None))
    return Image.fromarray(levels.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))


def mosaic(view: Image.Image, num_visual_tokens: int) -> Image.Image:
    """`view` as one pixel per visual token."""
    grid = isqrt(num_visual_tokens)
    return view.resize((grid, grid), Image.Resampling.BOX)


def plot_comparison(
    comparison: BudgetComparison, image: Image.Image, processor: DeltaLlavaProcessor, model: str, path: Path
) -> None:
    """
    Write answers and times of every budget, each beside a mosaic of as many tiles.

    Args:
        comparison: of `compare_budgets`.
        image: what was asked about.
        processor: the model's, which says how the image was padded or cropped.
        model: name to show.
        path: of the figure.

    Raises:
        DeltaLlavaError: see `check_figure_path`.
    """
    texts = [f"{_wrap(model, 60)}\n{_wrap(comparison.prompt, 60)}"]
    for run in comparison.runs:
        auto = ", chosen by auto" if run.chosen_by_auto else ""
        texts.append(
            f"{count(run.num_visual_tokens, 'visual token')}, loss {run.loss:.2f}{auto}\n"
            f"first token {run.first_token_ms:,.1f} ms, {count(run.answer_tokens, 'token')} in {run.total_ms:,.1f} ms\n\n"
            f"{_wrap(run.answer or '(empty)', 60)}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    where = f"{comparison.device}, {comparison.dtype}, {count(comparison.threads, 'thread')}, {versions}."
    notes = _wrap(f"{comparison.times} {where} {MOSAIC} Auto may lose {comparison.auto_max_loss:g}.", 160)
    view = tower_view(image, processor)
    shown = [view, *(mosaic(view, run.num_visual_tokens) for run in comparison.runs)]
    heights = [max(1.2, 0.2 * len(text.splitlines())) for text in texts]
    with new_figure(path, 12, sum(heights) + 1.2) as figure:
        grid = figure.subplots(len(heights), 3, height_ratios=heights, width_ratios=[1.2, 4, 5], sharex="col")
        for (tiles, times, side), pixels, text in zip(grid, shown, texts):
            tiles.imshow(pixels, interpolation="nearest", extent=(0, 1, 0, 1))
            side.text(0, 1, text, va="top")
            for axes in (tiles, times, side):
                axes.axis("off")
        for times, run in zip(grid[1:, 1], comparison.runs):
            times.axis("on")
            ends = [0.0, run.tower_ms, run.first_token_ms, run.total_ms]
            for (name, colour), start, end in zip(TIMES.items(), ends, ends[1:]):
                times.barh(0, end - start, left=start, color=colour, label=name)
            times.set(yticks=[], ylim=(-1, 1))
            times.spines[["top", "right", "left"]].set_visible(False)
        grid[-1, 1].set_xlabel("milliseconds")
        figure.legend(*grid[1, 1].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
        figure.supxlabel(notes, size=8, ha="left", x=0)


def overlay_saliency(image: Image.Image, explanation: Explanation, processor: DeltaLlavaProcessor) -> Image.Image:
    """
    The image as the vision tower sees it, padded or cropped to a square, with the saliency of `explanation` over it.

    The saliency is interpolated between the centres of its cells. A small square is enlarged to 336 pixels.

    Raises:
        ValueError: the image cannot be used, or matplotlib is not installed.
    """
    view = tower_view(image, processor)
    if view.width < PANEL:
        view = view.resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    cells = Image.fromarray(explanation.saliency.numpy())
    saliency = np.asarray(cells.resize(view.size, Image.Resampling.BILINEAR)).clip(0, 1)
    colours = 255 * import_matplotlib().colormaps["inferno"](saliency)[..., :3]
    opacity = (OPACITY[0] + (OPACITY[1] - OPACITY[0]) * saliency)[..., None]
    return Image.fromarray(np.rint(np.asarray(view) * (1 - opacity) + colours * opacity).astype(np.uint8))


def plot_explanations(
    image: Image.Image,
    explanations: Sequence[Explanation],
    processor: DeltaLlavaProcessor,
    prompt: str,
    path: Path,
    on: str = "visual_tokens",
) -> None:
    """
    Write the image, then the saliency of every explanation with its answer, side by side under the prompt.

    Raises:
        ValueError: the image cannot be used; see also `check_figure_path`.
    """
    whole = to_rgb(image, 0)
    whole.thumbnail((PANEL, PANEL), reducing_gap=4.0)
    panels = [(whole, "the image", "")]
    for explanation in explanations:
        title = count(explanation.num_visual_tokens, "visual token")
        answer = _wrap(explanation.answer or "(empty)", 44)
        source = "saliency" if explanation.saliency.any() else "no saliency"
        text = f"{answer}\n{_wrap(f'{source} of “{explanation.token}”', 44)}"
        panels.append((overlay_saliency(image, explanation, processor), title, text))
    columns = min(len(panels), PANELS_PER_ROW)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [3.8 + 0.18 * max(len(text.splitlines()) for *_, text in row) for row in rows]
    heading = _wrap(prompt, 40 * columns)
    with new_figure(path, 3.5 * columns, sum(heights) + 0.5 + 0.25 * len(heading.splitlines())) as figure:
        grid = figure.subplots(ceil(len(panels) / columns), columns, height_ratios=heights, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, (shown, title, text) in zip(grid.flat, panels):
            axes.axis("on")
            axes.set(xticks=[], yticks=[], title=title)
            axes.spines[:].set_visible(False)
            axes.set_xlabel(text, loc="left")
            axes.imshow(shown)
        figure.suptitle(heading, size=13)
        figure.supxlabel(f"{POSITIONS[on]} Every panel has its own scale, from none to most.", size=8)


def count(number: int, thing: str) -> str:
    """`number` of `thing`, in the plural where it takes one."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _wrap(text: str, width: int) -> str:
    """`text`, of a model or a file, in lines of at most `width` letters, half as many where some may be wide ones."""
    width = width if text.isascii() else width // 2
    lines = (textwrap.wrap(printable(line), width) or [""] for line in text.splitlines())
    return "\n".join(part for line in lines for part in line).replace("$", r"\$")  # or matplotlib reads mathematics
