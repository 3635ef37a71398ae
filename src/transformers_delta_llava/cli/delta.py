"""`delta-llava delta`."""

from pathlib import Path
from typing import Annotated

import typer


delta = typer.Typer(no_args_is_help=True, help="Take deltas out of models, shrink them, merge them into models.")

Output = Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)]


@delta.command()
def extract(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a model.", show_default=False)],
    output: Output,
    base: Annotated[
        str | None, typer.Option(help="What SOURCE was fine-tuned from; the deltas become the difference.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="With --base: rank of the difference that is kept.")] = None,
) -> None:
    """Write the deltas of a model, or of a fine-tuned model compared with its base."""
    from .. import deltas  # takes seconds to import, which `--help` need not wait for

    written = deltas.extract(source, output, base, rank)
    if written.left_out:
        typer.echo(f"warning: deltas cannot hold what else differs: {', '.join(written.left_out)}", err=True)
    typer.echo(f"{output}: rank {written.rank}, {written.energy:.6f} of the energy")


@delta.command()
def truncate(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of deltas or of a model.", show_default=False)],
    output: Output,
    rank: Annotated[int | None, typer.Option(help="Rank to keep.")] = None,
    energy: Annotated[float | None, typer.Option(help="Or share of the squared norm to keep.")] = None,
) -> None:
    """Write deltas at a lower rank, by singular values."""
    from .. import deltas

    written = deltas.truncate(source, output, rank, energy)
    typer.echo(f"{output}: rank {written.rank}, {written.energy:.6f} of the energy")


@delta.command()
def merge(
    repo: Annotated[str, typer.Argument(help="Folder or Hub id of a model.", show_default=False)],
    output: Output,
    deltas: Annotated[str | None, typer.Option(help="Deltas to merge; by default the model's own.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of new deltas to train in the result; 0 for none.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Accept deltas that belong to another base.")] = False,
) -> None:
    """Write a model whose projections have the deltas added to their bases."""
    from ..deltas import merge as merge_deltas

    merge_deltas(repo, output, deltas, rank, force)
    typer.echo(output)
