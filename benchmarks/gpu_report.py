"""What `on_gpu.py` measured, as sections and plots of `docs/performance.md`, beside the paper's figures and the hardware's floors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, write_json
from harness.plots import line_plot
from tables import Rows, goals_table, table
from training_step import TABLE_4


Report = dict[str, Any]
LLAVA = "LLaVA 576"
# Fig. 3 of the paper, tokens per second of answers of about 30 tokens; its text gives these two.
FIGURE_3 = {LLAVA: 23.96, 1: 37.08}
PUBLISHED_FIRST_TOKEN = 138  # milliseconds of LLaVA-1.5-7B on an A100
ANSWERS = (
    "visual tokens",
    "first token, ms",
    "of LLaVA's",
    "floor, ms",
    "times the floor",
    "per token, ms",
    "floor per token, ms",
    "times the floor per token",
    "tokens/s, 30",
    "gain",
    "tokens/s, 128",
    "projector's share",
    "tokens as generate's",
    "peak GB",
)


def take_over(folder: Path, results: Path, rehearsals: bool) -> None:
    """
    Copy the JSON of every part that has rows to `results/gpu_PART.json`, and draw its plots.

    Raises:
        ValueError: if there is none, or one is of a rehearsal and those may not be shown.
    """
    reports = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in PARTS
        if (folder / f"{name}.json").is_file()
    }
    measured = {name: report for name, report in reports.items() if report["rows"]}
    if not measured:
        raise ValueError(f"{folder} holds nothing that on_gpu.py measured.")
    if not rehearsals and any(report["rehearsal"] for report in measured.values()):
        raise ValueError(
            f"{folder} holds a rehearsal on the CPU, whose figures mean nothing: "
            "give --page and --results of their own to look at it."
        )
    results.mkdir(parents=True, exist_ok=True)
    for name, report in measured.items():
        write_json(results / f"gpu_{name}.json", report)
        if name in PLOTS:
            PLOTS[name](report["rows"], results / f"gpu_{name}.svg")
        print(f"{name}: {report['status']}, {len(report['rows'])} rows")


def heading(report: Report) -> list[str]:
    """On what, with what, when, by which command; what went wrong; the plot."""
    rates = [(name, value) for name, value in report.items() if name.startswith("rates")]
    lines = [
        f"{report['hardware']}; torch {report['torch']}, CUDA {report['cuda']}, transformers {report['transformers']}; "
        f"{report['date']}; `{report['command']}`, seed {report['seed']}."
    ]
    if report["rehearsal"]:
        lines.insert(0, "**A rehearsal on the CPU with tiny shapes. These figures mean nothing.**")
    for name, value in rates:
        dtype = name.partition(", ")[2] or "bfloat16"
        lines.append(
            f"Measured in {dtype}: {value['flops_per_second'] / 1e12:.3g} TFLOP/s in a large product, "
            f"{value['bytes_per_second'] / 1e12:.3g} TB/s in a large copy; floors are of these."
        )
    if report["status"] not in ("done", "with errors"):
        lines.append(f"The part did not end by itself ({report['status']}): rows are missing.")
    for title, entries in (("Went wrong", report.get("problems")), ("Left out", report.get("left_out"))):
        if entries:
            lines.append(f"{title}: {'; '.join(entries)}.")
    if report["part"] in PLOTS:
        lines.append(f"![{report['part']}](../benchmarks/results/gpu_{report['part']}.svg)")
    return lines


def grouped(rows: Rows, keys: tuple[str, ...], columns: tuple[str, ...]) -> list[str]:
    """A table for each combination of `keys`, under a line that names it; columns that no row of it has are left out."""
    parts = []
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        chosen = [row for row in rows if tuple(row[key] for key in keys) == values]
        there = [column for column in columns if any(row.get(column) is not None for row in chosen)]
        title = ", ".join(f"{key} {value}" for key, value in zip(keys, values))
        parts += [
            f"{title[:1].upper()}{title[1:]}:",
            table([{name: row.get(name) for name in there} for row in chosen]),
        ]
    return parts


# ---------------------------------------------------------------------------- sections


def end_to_end(report: Report) -> list[str]:
    """Goals, then a table for each batch and way."""
    rows: Rows = report["rows"]

    def of(batch: int, tokens: Any, field: str, ways: tuple[str, ...]) -> float | None:
        values = [
            row[field]
            for row in rows
            if row["batch"] == batch and row["visual tokens"] == tokens and row["way"] in ways and field in row
        ]
        return min(values) if values else None

    fast = ("compiled", "graph")
    gains = {
        way: next((r.get("gain") for r in rows if (r["batch"], r["visual tokens"], r["way"]) == (1, 1, way)), None)
        for way in ("dynamic", "compiled")
    }
    shares = [row["projector's share"] for row in rows if row["visual tokens"] != LLAVA]
    goals = [
        ("first token at 144 tokens, batch 1: times the floor", -2.0, of(1, 144, "times the floor", fast)),
        ("first token at 144 tokens, batch 1: of LLaVA's", -0.42, of(1, 144, "of LLaVA's", fast)),
        ("first token at 144 tokens, batch 32: of LLaVA's", -0.42, of(32, 144, "of LLaVA's", fast)),
        ("tokens/s from LLaVA to 1 token, batch 1: gain, as the paper ran it", 0.55, gains["dynamic"]),
        ("tokens/s from LLaVA to 1 token, batch 1: gain, compiled", 0.55, gains["compiled"]),
        ("projector, share of the first token, most", -0.03, max(shares) if shares else None),
        (
            "first token at 144 tokens, batch 1, ms; LLaVA-1.5-7B on an A100 is published with 138",
            -float(PUBLISHED_FIRST_TOKEN),
            of(1, 144, "first token, ms", ("dynamic",)),
        ),
    ]
    shown = [row | {"Fig. 3, tokens/s": FIGURE_3.get(row["visual tokens"])} for row in rows]
    drifts = [
        f"{name.removeprefix('drift, ')}: {value:.3f}" for name, value in report.items() if name.startswith("drift")
    ]
    parts = [*heading(report), goals_table(goals), *grouped(shown, ("batch", "way"), (*ANSWERS, "Fig. 3, tokens/s"))]
    if report.get("profile"):
        shown = [
            row | {"kernel": "`" + row["kernel"].replace("|", "/").replace("`", "'") + "`"}
            for row in report["profile"]
        ]
        parts.append("Which kernels a step of decoding and a prefill consist of, at batch 1:")
        parts += grouped(shown, ("visual tokens", "phase"), ("kernel", "calls", "ms", "share"))
    if drifts:
        parts.append(f"LLaVA's first token, its last run over its first: {'; '.join(drifts)}.")
    return parts


def answers_only(report: Report) -> list[str]:
    """A table for each batch and way."""
    return [*heading(report), *grouped(report["rows"], ("batch", "way"), (*ANSWERS, "s of warm-up"))]


def projector(report: Report) -> list[str]:
    """A table for each dtype, way and batch, milliseconds."""
    times = ("s", "released", "ours", "ours, graph", "token packer", "mlp", "released/ours")
    shares = ("share of peak", "floor, ms", "times the floor", "memory ratio", "error")
    ordered = sorted(report["rows"], key=lambda row: row["s"])
    return [*heading(report), *grouped(ordered, ("dtype", "batch", "way"), times + shares)]


def correctness(report: Report) -> list[str]:
    """Every check with its bound."""
    return [
        *heading(report),
        table(
            [
                {name: row[name] for name in ("check", "value", "at most")}
                | {"": "met" if row["ok"] else "**missed**"}
                for row in report["rows"]
            ]
        ),
    ]


def training_step(report: Report) -> list[str]:
    """A table for each kind of training, without and with gradient checkpointing."""
    columns = ("visual tokens", "ms", "images/s", "of LLaVA's", "Table 4", "peak GB")
    return [*heading(report), *grouped(report["rows"], ("kind", "checkpointing"), columns)]


def quantised(report: Report) -> list[str]:
    """A table for each model."""
    columns = (
        "weights",
        "GB of weights",
        *ANSWERS[1:],
        "first token, ms, of bfloat16's",
        "tokens/s, 30, of bfloat16's",
    )
    return [*heading(report), *grouped(report["rows"], ("visual tokens",), columns)]


GPU_SECTIONS: dict[str, Callable[[Report], list[str]]] = {
    "gpu_end_to_end": end_to_end,
    "gpu_projector": projector,
    "gpu_correctness": correctness,
    "gpu_training_step": training_step,
    "gpu_quantised": quantised,
    "gpu_end_to_end_13b": answers_only,
    "gpu_generate_compiled": answers_only,
}


# ---------------------------------------------------------------------------- plots


def plot_answers(rows: Rows, path: Path) -> None:
    """Time to the first token over visual tokens, for each way at each batch, and the floor."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["visual tokens"] != LLAVA:
            point = row["visual tokens"], row["first token, ms"]
            lines.setdefault(f"{row['way']}, batch {row['batch']}", []).append(point)
            if "floor, ms" in row and row["way"] == "graph":
                lines.setdefault(f"floor, batch {row['batch']}", []).append((point[0], row["floor, ms"]))
    _plot(lines, "Time to first token, ms", "visual tokens per image", path, log_y=True)


def plot_projector(rows: Rows, path: Path) -> None:
    """Time of the released computation over ours."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("released/ours") is not None and row["dtype"] == "bfloat16":
            lines.setdefault(f"{row['way']}, batch {row['batch']}", []).append((row["s"], row["released/ours"]))
    _plot(lines, "Released computation: times ours, bfloat16", "scale factor", path)


def plot_training(rows: Rows, path: Path) -> None:
    """Time of a step as a share of LLaVA's, without checkpointing, and Table 4."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["visual tokens"] != LLAVA and row["of LLaVA's"] is not None and not row["checkpointing"]:
            lines.setdefault(row["kind"], []).append((row["visual tokens"], row["of LLaVA's"]))
    first = TABLE_4["LLaVA"]
    for stage in (1, 2):
        points = [
            (tokens, times[stage - 1] / first[stage - 1]) for tokens, times in TABLE_4.items() if tokens != "LLaVA"
        ]
        lines[f"Table 4, stage {stage}"] = points
    _plot(lines, "Step time, share of LLaVA's", "visual tokens per image", path)


def _plot(lines: Any, title: str, x_label: str, path: Path, log_y: bool = False) -> None:
    if lines:
        line_plot(lines, title, x_label, path, log_x=True, log_y=log_y)


PLOTS: dict[str, Callable[[Rows, Path], None]] = {
    "end_to_end": plot_answers,
    "end_to_end_13b": plot_answers,
    "projector": plot_projector,
    "training_step": plot_training,
}
