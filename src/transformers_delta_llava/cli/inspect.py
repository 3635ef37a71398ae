"""`delta-llava inspect`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import Json, cell, print_json, say


if TYPE_CHECKING:
    from ..conversion import Inspection


def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a repo or a checkpoint.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Print what a repo or checkpoint holds and what is wrong with it; exits with code 1 where something is."""
    from ..conversion import inspect_model

    result = inspect_model(model)
    if as_json:
        print_json(asdict(result))
    else:
        _print(result)
    if result.problems:
        raise typer.Exit(1)


def _print(result: "Inspection") -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table("part", "parameters", "tensors", "bytes", "dtypes", title=cell(f"{result.name} ({result.kind})"))
    for name, part in result.components.items():
        table.add_row(
            name, f"{part.parameters:,}", f"{part.tensors}", f"{part.num_bytes:,}", ", ".join(sorted(part.dtypes))
        )
    console.print(table)
    if result.visual_token_budgets:
        budgets = ", ".join(map(str, result.visual_token_budgets))
        say(f"visual tokens per image: {result.num_visual_tokens} by default, of {budgets}", console)
    if result.chat_template and result.first_prompt:
        say(f"chat template: {result.chat_template.name} ({result.chat_template.reason}), which asks", console)
        for line in result.first_prompt.split("\n"):
            say(f"    {line}", console)
    if result.kind == "repo":
        say(f"code: version {result.code_version}", console)
    if result.delta_rank is not None:
        say(f"deltas: rank {result.delta_rank}", console)
    for problem in result.problems:
        say(f"problem: {problem}", console)
    if not result.problems:
        say("OK", console)
