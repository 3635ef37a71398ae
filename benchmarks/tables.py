"""Rows of results as tables in Markdown."""

from typing import Any


Rows = list[dict[str, Any]]


def table(rows: Rows) -> str:
    """A table in Markdown, floats to three figures."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([number(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def goals_table(goals: list[tuple[str, float, float | None]]) -> str:
    """A table of (name, bound, measured value); a negative bound is an upper one. None: not measured."""
    rows: Rows = []
    for name, bound, value in goals:
        met = value is not None and (value >= bound if bound > 0 else value <= -bound)
        verdict = "not measured" if value is None else "met" if met else "**missed**"
        wanted = f"{'>=' if bound > 0 else '<='} {abs(bound):g}"
        rows.append({"goal": name, "wanted": wanted, "measured": value, "": verdict})
    return table(rows)


def number(value: Any) -> str:
    """Three figures of a float, without an exponent where it is not tiny; nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
