"""`delta-llava inspect`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..conversion import Inspection, inspect_model
from .options import cell, say


def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a repo or a checkpoint.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a repo or checkpoint holds and what is wrong with it; exits with code 1 where something is."""
    found = inspect_model(model)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        _print(found)
    if found.problems:
        raise typer.Exit(1)


def _print(found: Inspection) -> None:
    talk = Console(soft_wrap=True, highlight=False)
    table = Table("part", "parameters", "tensors", "bytes", "dtypes", title=cell(f"{found.name} ({found.kind})"))
    for name, part in found.components.items():
        table.add_row(
            name, f"{part.parameters:,}", f"{part.tensors}", f"{part.num_bytes:,}", ", ".join(sorted(part.dtypes))
        )
    talk.print(table)
    if found.visual_token_budgets:
        budgets = ", ".join(map(str, found.visual_token_budgets))
        say(f"visual tokens per image: {found.default_visual_tokens} by default, of {budgets}", talk)
    if found.first_prompt is not None:
        say(f"chat template: {found.chat_template} ({found.chat_template_reason}), which asks", talk)
        for line in found.first_prompt.split("\n"):
            say(f"    {line}", talk)
    if found.kind == "repo":
        state = "as released" if found.code_is_current else "see below; `delta-llava update` brings today's"
        say(f"code: version {found.code_version or 'unknown (before 0.1.0)'}, {state}", talk)
    if found.deltas:
        deltas = Table("delta", "rank", "norm", "norm of its base", "ratio")
        for delta in found.deltas:
            ratio = f"{delta.norm / delta.base_norm:.3g}" if delta.base_norm else "-"
            deltas.add_row(cell(delta.name), str(delta.rank), f"{delta.norm:.4g}", f"{delta.base_norm:.4g}", ratio)
        talk.print(deltas)
    for problem in found.problems:
        say(f"wrong: {problem}", talk)
    if not found.problems:
        say("nothing wrong was found", talk)
