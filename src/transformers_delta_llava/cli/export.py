"""`delta-llava export`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..conversion import export_checkpoint
from .options import say


class Format(str, Enum):
    """Layouts that can be written."""

    released = "released"


def export(
    repo: Annotated[str, typer.Argument(help="Folder or Hub id of a Delta-LLaVA repo.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to.", show_default=False)],
    layout: Annotated[Format, typer.Option("--format", help="released: the authors' layout.")] = Format.released,
    projector_only: Annotated[
        bool, typer.Option("--projector-only", help="Write mm_projector.bin and config.json alone.")
    ] = False,
    vocab_size: Annotated[
        int | None, typer.Option(help="Rows of the vocabulary to keep; by default those that were trained.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes per weight file.")] = "2GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a repo back as a checkpoint in the authors' layout, bit for bit, and print its path."""
    report = export_checkpoint(
        repo,
        output,
        projector_only=projector_only,
        vocab_size=vocab_size,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
    )
    say(
        f"{report.tensors_written} tensors in {len(report.weight_files)} files, layout {layout.value}, "
        f"{report.vocab_size} rows of vocabulary"
    )
    if report.extra_keys:
        say(
            f"note: {', '.join(report.extra_keys)} in config.json tell `delta-llava convert` what the authors' code cannot be "
            "told; it would not run this model"
        )
    typer.echo(report.output)
