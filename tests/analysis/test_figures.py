"""Figures show their numbers and texts, whole or not at all."""

import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from harness.plots import line_plot
from tests.tiny import noise
from transformers_delta_llava.analysis import (
    BudgetComparison,
    BudgetRun,
    Explanation,
    bar_plot,
    figures,
    overlay_saliency,
    plot_comparison,
    plot_delta_stats,
    plot_explanations,
)
from transformers_delta_llava.deltas import DeltaRow


NOISE = noise()
EVIL = "<script>alert('1')</script> & $\\frac{1}$ \x1b[31m {{ 7 * 7 }}"


def texts(path: Path) -> list[str]:
    """Texts of an SVG, in their order."""
    return ["".join(node.itertext()) for node in ET.parse(path).iter() if node.tag.endswith("}text")]


@pytest.mark.parametrize(("suffix", "log"), [(".svg", False), (".svg", True), (".PNG", False)])
def test_lines_and_bars(tmp_path: Path, suffix: str, log: bool) -> None:
    path = tmp_path / f"plot{suffix}"
    lines = {"a < b": [(4, 30.0), (1, 10.0), (2, 20.0)], "flat": [(1, 5.0)]}
    line_plot(lines, "Title & more", "tokens", path, log_x=log, log_y=log)
    if suffix == ".PNG":
        assert Image.open(path).format == "PNG"
        return
    assert {"a < b", "flat", "Title & more", "tokens", "1", "2", "4"} <= set(texts(path))
    again = path.read_bytes()
    line_plot(lines, "Title & more", "tokens", path, log_x=log, log_y=log)
    assert path.read_bytes() == again  # no date, no random ids
    bar_plot({"576": {"tower": 1.0, "prefill": 7.0}, "1": {"tower": 1.0, "prefill": 0.0}}, "TFLOPs", "tokens", path)
    assert {"576", "1", "8", "tower", "prefill"} <= set(texts(path))


def test_deltas(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    row = DeltaRow("k_proj", 12, 4, 3.0, 6.0, 2, [2.0, 1.0, 0.0])
    plot_delta_stats([row, DeltaRow("q_proj", None, 4, 1.0, 4.0, 1, [1.0])], "Deltas of x", path)
    assert {"k_proj level 12", "q_proj", "0.5", "0.25", "norm of the delta in units of its base's"} <= set(texts(path))
    plot_delta_stats([DeltaRow("k_proj", None, 4, 3.0, None, 2, [2.0, 1.0])], "Deltas of x", path)
    assert {"3", "norm of the delta", "Deltas of x"} <= set(texts(path))
    plot_delta_stats([DeltaRow("k_proj", None, 4, 0.0, 6.0, 1, [0.0])], "zero", path)
    assert "all deltas are zero" in texts(path)


def comparison(answer: str, prompt: str) -> BudgetComparison:
    runs = [BudgetRun(n, 50, answer, 2, 1.0, 3.0, 4.0, 1 / n, n == 36) for n in (144, 36, 1)]
    return BudgetComparison(prompt, runs, 0.3, 3, 64, "cpu", "float32", 1, {"torch": "2", "transformers": "5"})


def test_a_comparison_shows_answers_and_times_as_they_are(processor: Any, tmp_path: Path) -> None:
    path = tmp_path / "figure.svg"
    plot_comparison(comparison(EVIL, EVIL), NOISE, processor, "tiny", path)
    text = " ".join(texts(path))
    shown = " ".join(EVIL.replace("\x1b", "\\x1b").split())
    assert text.count(shown) == 4  # the prompt and three answers
    assert (
        text.count("chosen by auto") == 1
        and text.count("first token 3.0 ms, 2 tokens in 4.0 ms") == 3
        and "loss 0.03" in text
    )
    assert "Medians of 3 runs" in text and "1 visual token, loss" in text and "vision tower" in text
    assert ET.parse(path).getroot().findall(".//{*}script") == []


def test_figures_hold_every_answer(processor: Any, tmp_path: Path) -> None:
    """Nothing is cut at an edge."""
    answers = ["", "word " * 300, "x" * 2000, "two\n\nlines", "日本語のとても長い答え" * 30]
    many = comparison("", "what is it? " * 20)
    runs = [replace(many.runs[0], answer=answer) for answer in answers]
    plot_comparison(replace(many, runs=runs), NOISE, processor, "model", tmp_path / "budgets.png")
    explanations = [Explanation(torch.rand(6, 6), answer, "cat", 36) for answer in answers]
    plot_explanations(NOISE, explanations, processor, "what? " * 40, tmp_path / "explain.png")
    for name in ("budgets.png", "explain.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert pixels.min() < 128
        for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
            assert (edge == 255).all(), name


def test_explanations_are_side_by_side(processor: Any, tmp_path: Path) -> None:
    path = tmp_path / "figure.svg"
    explanations = [Explanation(torch.rand(6, 6), "a cat", "cat", 36), Explanation(torch.zeros(1, 1), "", "$", 1)]
    plot_explanations(NOISE, explanations, processor, EVIL, path, "patches")
    assert {"the image", "36 visual tokens", "a cat", "saliency of “cat”", "1 visual token", "(empty)"} <= set(
        texts(path)
    )
    assert "no saliency of “$”" in texts(path) and any("at the patches" in text for text in texts(path))
    assert len(ET.parse(path).getroot().findall(".//{*}image")) == 3


def test_a_mosaic_has_one_tile_per_token() -> None:
    tiles = np.kron(np.array([[0, 200], [200, 0]], np.uint8), np.ones((12, 12), np.uint8))
    assert np.asarray(figures.mosaic(Image.fromarray(tiles), 4)).tolist() == [[0, 200], [200, 0]]
    assert np.asarray(figures.mosaic(Image.fromarray(tiles), 1)).tolist() == [[100]]


def test_saliency_is_drawn_where_it_is(processor: Any) -> None:
    grey = Image.new("RGB", (48, 24), "grey")
    none = np.asarray(overlay_saliency(grey, Explanation(torch.zeros(6, 6), "", "", 36), processor), int)
    assert none.shape == (336, 336, 3)
    view = np.asarray(figures.tower_view(grey, processor).resize((336, 336)), int)
    assert (none <= view).all() and none.std(axis=(0, 1)).max() < 20  # darker, the same all over but for the padding
    saliency = torch.zeros(6, 6)
    saliency[1, 4] = 1
    one = np.asarray(overlay_saliency(grey, Explanation(saliency, "", "", 36), processor), int)
    changed = np.abs(one - none).sum(-1)
    row, column = np.unravel_index(changed.argmax(), changed.shape)
    assert 56 <= row < 112 and 224 <= column < 280
    assert not changed[168:].any() and not changed[:, :168].any()
    even = np.asarray(overlay_saliency(grey, Explanation(torch.ones(1, 1), "", "", 1), processor), int)
    assert (even[100:200].std(axis=(0, 1)) < 1).all() and (even.sum(-1) > none.sum(-1)).all()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ValueError, match=r"^Figures need matplotlib: pip install 'transformers-delta-llava\[plots\]'\.$"
    ):
        bar_plot({"1": {"a": 1}}, "", "", tmp_path / "a.svg")


def test_an_error_leaves_the_earlier_figure(tmp_path: Path, monkeypatch: Any) -> None:
    from matplotlib.figure import Figure

    def save(self: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", save)
    path = tmp_path / "a.svg"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        bar_plot({"1": {"a": 1}}, "", "", path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
