"""The benchmark of auto: its numbers are those of its parts."""

import json
import sys

from PIL import Image

import auto_budget


def test_it_measures_what_it_says(tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "results" / "auto.json"
    monkeypatch.setattr(sys, "argv", ["auto_budget.py", "--limit", "6", "--images", "--output", str(output)])
    auto_budget.main()
    report = json.loads(output.read_text())
    assert (report["questions"], report["command"].split()[1]) == (6, "benchmarks/auto_budget.py")
    assert [row["visual_tokens"] for row in report["fixed"]] == [64, 16, 4, 1]
    for row in report["auto"]:
        assert sum(row["picked"].values()) == row["total"] == 6
        assert row["mean_visual_tokens"] == sum(int(n) * times for n, times in row["picked"].items()) / 6
        assert {int(n) for n in row["picked"]} == set(row["among"])
    by_loss = [row["mean_visual_tokens"] for row in report["auto"] if len(row["among"]) == 3]
    assert by_loss == sorted(by_loss, reverse=True) and (by_loss[0], by_loss[-1]) == (16, 1)
    assert "auto among 16, 4, 1; loss up" in capsys.readouterr().out


def test_images_with_less_detail_get_fewer_tokens(tmp_path) -> None:
    synthetic = {row["image"]: row["picked"]["0.3"] for row in auto_budget.synthetic()}
    assert synthetic == {
        "plain": 1,
        "slope": 4,
        "noise (seed 0)": 576,
        "chessboard 2 x 2": 4,
        "chessboard 4 x 4": 16,
        "chessboard 8 x 8": 64,
        "chessboard 24 x 24": 576,
    }
    photo = auto_budget.ROOT / "examples" / "images" / "chelsea.jpg"
    sharp, soft, softer = (row["picked"]["0.3"] for row in auto_budget.variants(photo))
    assert sharp >= soft > softer > 1
    Image.new("RGB", (90, 30), "red").save(tmp_path / "red.png")
    assert [row["picked"]["0.1"] for row in auto_budget.variants(tmp_path / "red.png")] == [1, 1, 1]
