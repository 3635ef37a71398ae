"""Plots are well-formed SVGs that show their numbers."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from transformers_delta_llava.analysis import bar_plot, line_plot


SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("log_y", [False, True])
def test_lines(tmp_path: Path, log_x: bool, log_y: bool) -> None:
    lines = {"a < b": [(4, 30.0), (1, 10.0), (2, 20.0)], "flat": [(1, 5.0)]}
    line_plot(lines, "Title & more", "tokens", tmp_path / "new" / "plot.svg", log_x=log_x, log_y=log_y)
    root = ET.parse(tmp_path / "new" / "plot.svg").getroot()
    texts = [node.text for node in root.iter(f"{SVG}text")]
    assert {"a < b", "flat", "Title & more", "tokens", "1", "2", "4"} <= set(texts)
    marks = [(float(node.get("cx")), float(node.get("cy"))) for node in root.iter(f"{SVG}circle")]
    assert len(marks) == 4
    first = marks[:3]
    assert first == sorted(first) and [y for _, y in first] == sorted((y for _, y in first), reverse=True)
    assert all(70 <= x <= 610 and 40 <= y <= 360 for x, y in marks)
    left, middle, right = (x for x, _ in first)
    assert (middle - left == pytest.approx(right - middle, abs=0.2)) == log_x


def test_bars_stack_to_their_sum(tmp_path: Path) -> None:
    bars = {"576": {"tower": 1.0, "prefill": 7.0}, "1": {"tower": 1.0, "prefill": 0.0}}
    bar_plot(bars, "TFLOPs", "visual tokens", tmp_path / "bars.svg")
    root = ET.parse(tmp_path / "bars.svg").getroot()
    boxes = [node for node in root.iter(f"{SVG}rect") if node.get("x") and node.get("width") != "12"]
    heights = [float(node.get("height")) for node in boxes]
    assert heights == pytest.approx([40, 280, 40, 0], abs=0.2)  # 320 pixels for 8
    assert float(boxes[1].get("y")) + heights[1] == pytest.approx(float(boxes[0].get("y")), abs=0.2)
    assert {"576", "1", "8", "tower", "prefill"} <= {node.text for node in root.iter(f"{SVG}text")}
