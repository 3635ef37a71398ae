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
    if result.first_prompt is not None:
        say(f"chat template: {result.chat_template} ({result.chat_template_reason}), which asks", console)
        for line in result.first_prompt.split("\n"):
            say(f"    {line}", console)
    if result.kind == "repo":
        state = "as released" if result.code_is_current else "see below; `delta-llava update` brings today's"
        say(f"code: version {result.code_version or 'unknown (before 0.1.0)'}, {state}", console)
    if result.deltas:
        deltas = Table("delta", "rank", "norm", "norm of its base", "ratio")
        for delta in result.deltas:
            ratio = f"{delta.norm / delta.base_norm:.3g}" if delta.base_norm else "-"
            deltas.add_row(cell(delta.name), str(delta.rank), f"{delta.norm:.4g}", f"{delta.base_norm:.4g}", ratio)
        console.print(deltas)
    for problem in result.problems:
        say(f"wrong: {problem}", console)
    if not result.problems:
        say("nothing wrong was found", console)
