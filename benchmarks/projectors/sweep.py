"""Finished models of a sweep, a line each, and their table."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def read_runs(results: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and least to most where there are several."""
    mean, least, most = (f"{value:.{digits}f}" for value in (statistics.fmean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({least} to {most})"


def show_table(title: str, header: list[str], rows: list[list[str]], file: Path) -> None:
    """Print a table, and write it as Markdown."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = [title, "", " | ".join(header), " | ".join("---" for _ in header), *(" | ".join(row) for row in rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
