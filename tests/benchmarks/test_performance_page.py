"""The page of measured performance holds what the committed results say, and says when a goal is missed."""

import json

from tables import goals_table
from write_performance_page import ROOT, projector_goals, render


def test_the_page_is_up_to_date() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    page = (ROOT / "docs" / "performance.md").read_text()
    assert render(page, results) == page, "run python benchmarks/write_performance_page.py"


def test_figures_replace_what_stood_there() -> None:
    report = {"hardware": "CPU", "options": {"device": "cpu", "dtype": "float32"}, "threads": 2}
    report |= {"torch": "2", "transformers": "5", "rows": [{"what": "loading", "s": 0.12345, "none": None}]}
    page = "Text.\n<!-- processing -->\nold\n<!-- end -->\nMore.\n<!-- scaling -->\nold\n<!-- end -->\n"
    rendered = render(page, {"processing": report})
    assert "| loading | 0.123 |  |" in rendered and "CPU, cpu, float32, 2 threads" in rendered
    assert "old" not in rendered and "Not measured yet." in rendered
    assert rendered.startswith("Text.\n") and "\nMore.\n" in rendered
    assert render(rendered, {"processing": report}) == rendered


def test_goals_are_met_or_missed() -> None:
    def row(batch: int, s: int, ratio: float) -> dict:
        shares = {"share of peak": 0.9, "memory ratio": 0.7, "error": 1e-6}
        return {"batch": batch, "s": s, "released/ours": ratio, **shares}

    goals = projector_goals([row(1, 1, 2.5), row(1, 2, 1.4), row(4, 2, 1.3), row(1, 6, 1.9)], [row(1, 2, 1.31)])
    lines = goals_table(goals).splitlines()[2:]
    assert len(lines) == 9 and sum("| met |" in line for line in lines) == 7
    assert {line.strip("| ").split(" |")[0].split(":")[0] for line in lines if "**missed**" in line} == {
        "forward, batch 1, s = 2",
        "peak memory at inference, share of released, most",
    }
