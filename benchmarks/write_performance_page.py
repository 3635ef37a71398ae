"""Puts the figures of `benchmarks/results/*.json` into `docs/performance.md`, and says which goals are met.

    python benchmarks/write_performance_page.py
    python benchmarks/write_performance_page.py --gpu OUT

The second form takes over what `on_gpu.py` wrote into OUT. The text of the page is written by hand; what stands between
`<!-- NAME -->` and `<!-- end -->` is not.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_report import GPU_SECTIONS, take_over
from tables import Rows, goals_table, table


ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description="Render the page of measured performance.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--gpu", type=Path, help="folder of on_gpu.py, to be taken over into the results")
    arguments = parser.parse_args()
    if arguments.gpu is not None:
        elsewhere = arguments.page.resolve() != PAGE and arguments.results.resolve() != RESULTS
        try:
            take_over(arguments.gpu, arguments.results, rehearsals=elsewhere)
        except ValueError as error:
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(2)
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in arguments.results.glob("*.json")}
    page = arguments.page.read_text(encoding="utf-8")
    arguments.page.write_text(render(page, reports), encoding="utf-8")
    print(f"wrote {arguments.page.name} from {len(reports)} results")


def render(page: str, reports: dict[str, dict[str, Any]]) -> str:
    """The page with every marked part filled from the report of that name, or marked as not measured."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in reports:
            body = "Not measured yet."
        elif name in GPU_SECTIONS:
            body = "\n\n".join(GPU_SECTIONS[name](reports[name]))
        else:
            body = "\n\n".join([hardware(reports[name]), *SECTIONS[name.split("_")[0]](reports[name])])
        return f"<!-- {name} -->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- (?P<name>[\w.]+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def hardware(report: dict[str, Any]) -> str:
    """One line on where the figures come from."""
    options = report["options"]
    return (
        f"{report['hardware']}, {options['device']}, {options['dtype']}, {report['threads']} threads; "
        f"torch {report['torch']}, transformers {report['transformers']}."
    )


def projector(report: dict[str, Any]) -> list[str]:
    """Goals, then the figures of one image at every scale factor."""
    rows, training = report["inference"], report["training"]
    columns = ("s", "released", "ours", "token packer", "mlp", "released/ours", "share of peak", "share of products")
    parts = [goals_table(projector_goals(rows, training))]
    for batch in dict.fromkeys(row["batch"] for row in rows):
        figures = [
            {name: row[name] for name in (*columns, "memory ratio", "error")} for row in rows if row["batch"] == batch
        ]
        both = [{name: row[name] for name in columns[:6]} for row in training if row["batch"] == batch]
        parts += [f"Forward, batch {batch}, milliseconds:", table(figures)]
        parts += [f"Forward and backward, batch {batch}, milliseconds:", table(both)]
    return parts


def projector_goals(inference: Rows, training: Rows) -> list[tuple[str, float, float | None]]:
    """(name, bound, measured value) of what was measured, as `goals_table` takes them."""

    def among(
        rows: Rows, field: str, worst: Callable[..., float] = min, batch: int | None = None, s: Any = None
    ) -> Any:
        values = [r[field] for r in rows if batch in (None, r["batch"]) and (s is None or r["s"] in s)]
        return worst(values) if values else None

    speed, peak = "released/ours", "share of peak"
    goals = [
        ("forward, batch 1, s = 2: times faster than released", 1.45, among(inference, speed, batch=1, s=(2,))),
        ("forward, batch 1, s >= 6", 1.8, among(inference, speed, batch=1, s=(6, 8, 12, 24))),
        ("forward, batch 1, s = 1", 2.0, among(inference, speed, batch=1, s=(1,))),
        ("forward, batch 4, s = 2", 1.3, among(inference, speed, batch=4, s=(2,))),
        ("forward, slowest of all", 1.0, among(inference, speed)),
        ("forward and backward, batch 1, s = 2", 1.3, among(training, speed, batch=1, s=(2,))),
        ("share of the matrix-multiply peak, batch 1, s = 2", 0.85, among(inference, peak, batch=1, s=(2,))),
        ("peak memory at inference, share of released, most", -0.6, among(inference, "memory ratio", max)),
        ("relative error, most", -1e-5, among(inference, "error", max)),
    ]
    return [goal for goal in goals if goal[2] is not None]


def rows_only(report: dict[str, Any]) -> list[str]:
    """The rows as they are."""
    return [table(report.get("rows") or report["exponents"])]


def onnx(report: dict[str, Any]) -> list[str]:
    """Speed at every number of visual tokens, then what does not depend on it."""
    clock = "the processor's time" if report["options"]["clock"] == "cpu" else "the clock's time"
    load = report["load"]
    busy = f"onnxruntime {report['versions']['onnxruntime']}; {clock}, on {report['cpus']} cores under a load of"
    return [f"{busy} {load['before']:.1f} to {load['after']:.1f}.", table(report["rows"]), table(report["costs"])]


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "projector": projector,
    "end": rows_only,  # end_to_end_...
    "training": rows_only,
    "processing": rows_only,
    "scaling": rows_only,
    "onnx": onnx,
}


if __name__ == "__main__":
    main()
