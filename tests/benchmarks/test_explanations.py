"""The benchmark of saliency: a shape is found on its ground, and the shares are those of the cells that it reaches into."""

import sys

import numpy as np
from PIL import Image, ImageDraw

import explanations


def test_a_shape_is_what_is_not_the_ground() -> None:
    image = Image.new("RGB", (16, 16), (200, 230, 240))
    ImageDraw.Draw(image).rectangle((0, 0, 3, 7), fill="red")  # over a corner
    mask = explanations.shape_mask(image)
    assert mask[:8, :4].all() and mask.sum() == 32


def test_saliency_is_judged_by_cells() -> None:
    shape = np.zeros((8, 8), bool)
    shape[0:4, 0:2] = True  # two of the sixteen cells
    shape[4, 0] = True  # and a quarter of a third
    saliency = np.zeros((4, 4))
    assert explanations.judge(saliency, shape) is None
    saliency[0, 0], saliency[3, 3] = 3, 1
    assert explanations.judge(saliency, shape) == (0.75, 3 / 16, True, True)
    saliency[3, 3] = 30
    assert (
        explanations.judge(saliency, shape)[2:] == (False, False)
        and explanations.judge(np.ones((4, 4)), shape)[0] == 3 / 16
    )
    assert (
        explanations.summary([None, (0.5, 0.2, True, False), (0.7, 0.4, False, False), None])
        == "50 | 60 | 30 | 50 | 0"
    )


def test_it_writes_what_it_prints(tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "results" / "table.md"
    monkeypatch.setattr(sys, "argv", ["explanations.py", "--images", "2", "--output", str(output)])
    monkeypatch.setattr(explanations, "LOOKS", [("patches", 4), ("visual_tokens", 4)])
    explanations.main()
    printed, written = capsys.readouterr().out, output.read_text()
    assert written.startswith("`python benchmarks/explanations.py --images 2`: 2 images, percent.")
    assert [row for row in written.splitlines() if row.startswith("| ")] == [
        row for row in printed.splitlines() if row.startswith("| ")
    ]
    assert written.count("| as drawn |") == written.count("| Grad-CAM |") == 2
