"""`delta-llava delta`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import Json, ShardSize, cell, print_json, say


if TYPE_CHECKING:
    import torch

    from ..deltas import DeltaReport, DeltaRow

delta = typer.Typer(no_args_is_help=True, help="Take deltas out of models, shrink them, put them into models.")


Output = Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)]
DeltaDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Dtype of the deltas, float32, bfloat16 or float16; by default the source's."),
]
Force = Annotated[bool, typer.Option("--force", help="Take deltas that belong to another base.")]


@delta.command()
def extract(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a repo or a checkpoint.", show_default=False)],
    output: Output,
    base: Annotated[
        str | None, typer.Option(help="What SOURCE was fine-tuned from; the deltas become the difference.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="With --base: rank of the difference that is kept.")] = None,
    dtype: DeltaDtype = None,
    as_json: Json = False,
) -> None:
    """Write the deltas of a model, or of a fine-tuned model against its base, as a delta repo."""
    from ..deltas import extract_deltas  # takes seconds to import, which `--help` need not wait for

    report = extract_deltas(source, output, base, rank, _dtype(dtype))
    if report.left_out:
        names = ", ".join(report.left_out[:6]) + (" ..." if len(report.left_out) > 6 else "")
        say(
            f"warning: {len(report.left_out)} other tensors of the two projectors differ, and deltas cannot hold them: {names}"
        )
    _print_report(report, as_json)


@delta.command()
def truncate(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a delta repo or a model.", show_default=False)],
    output: Output,
    rank: Annotated[int | None, typer.Option(help="Rank to keep.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or share of the squared norm to keep, in every projection and level.")
    ] = None,
    dtype: DeltaDtype = None,
    as_json: Json = False,
) -> None:
    """Write deltas at a lower rank, by singular values."""
    from ..deltas import truncate_deltas

    _print_report(truncate_deltas(source, output, rank, energy, _dtype(dtype)), as_json)


@delta.command()
def apply(
    repo: Annotated[str, typer.Argument(help="Folder or Hub id of a model's repo.", show_default=False)],
    deltas: Annotated[str, typer.Argument(help="Folder or Hub id of a delta repo.", show_default=False)],
    output: Output,
    force: Force = False,
    max_shard_size: ShardSize = "2GB",
    as_json: Json = False,
) -> None:
    """Write a model's repo with these deltas in the place of its own."""
    from ..deltas import apply_deltas

    _print_report(apply_deltas(repo, output, deltas, force, max_shard_size), as_json)


@delta.command()
def merge(
    repo: Annotated[str, typer.Argument(help="Folder or Hub id of a model's repo.", show_default=False)],
    output: Output,
    deltas: Annotated[str | None, typer.Option(help="Delta repo to merge; by default the model's own deltas.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of new, empty deltas in the result; 0 for none.")] = 0,
    force: Force = False,
    max_shard_size: ShardSize = "2GB",
    as_json: Json = False,
) -> None:
    """Write a model's repo with the deltas added to its bases."""
    from ..deltas import merge_into_base

    _print_report(merge_into_base(repo, output, deltas, rank, force, max_shard_size), as_json)


@delta.command()
def stats(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a delta repo or a model.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="For a delta repo: the model with its base.")] = None,
    as_json: Json = False,
) -> None:
    """Print singular values and norms of deltas, by projection and level."""
    from ..deltas import delta_stats

    rows = delta_stats(source, base)
    if as_json:
        print_json([{**asdict(row), "ratio": row.ratio} for row in rows])
    else:
        _print_table(rows)


def _print_table(rows: list["DeltaRow"]) -> None:
    table = Table("projection", "level", "rank", "99 % at", "norm", "of base", "ratio", "singular values")
    for row in rows:
        values = " ".join(f"{value:.3g}" for value in row.singular_values[:4])
        more = " ..." if len(row.singular_values) > 4 else ""
        table.add_row(
            cell(row.projection),
            "" if row.level is None else str(row.level),
            str(row.rank),
            str(row.rank_99),
            f"{row.norm:.4g}",
            "" if row.base_norm is None else f"{row.base_norm:.4g}",
            "" if row.ratio is None else f"{row.ratio:.3g}",
            values + more,
        )
    Console(soft_wrap=True, highlight=False).print(table)


def _print_report(report: "DeltaReport", as_json: bool) -> None:
    if as_json:
        print_json(asdict(report))
        return
    say(f"rank {report.rank}, {report.parameters:,} numbers")
    if report.energy_by_projection:
        each = ", ".join(f"{name} {energy:.6f}" for name, energy in report.energy_by_projection.items())
        say(f"energy kept: {report.energy:.6f} ({each})")
    typer.echo(report.output)


def _dtype(name: str | None) -> "torch.dtype | None":
    from ..utils.validation import torch_dtype

    return None if name is None else torch_dtype(name)
