"""`delta-llava convert`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..conversion import convert_checkpoint


def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder in the authors' layout.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write the Hub repo to.", show_default=False)],
    base_model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the language model that a projector or a LoRA run was trained on."),
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the vision tower; by default what the config names.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer; by default the source's own.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Cast weights to float32, bfloat16 or float16; by default each keeps its own.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Prompt format by name, or a Jinja file; by default the model family's.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes per weight file.")] = "2GB",
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the written tensors back and compare every one with its source.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion's output.")] = False,
) -> None:
    """Convert a trained checkpoint into a Hub repo, and print the repo's path."""
    talk = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=talk, transient=True, disable=not talk.is_terminal) as bar:
        task = bar.add_task("writing", total=None)
        report = convert_checkpoint(
            source,
            output,
            base_model=base_model,
            vision_tower=vision_tower,
            tokenizer=tokenizer,
            dtype=dtype,
            chat_template=chat_template,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            verify=verify,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            verify_progress=lambda done, total: bar.update(task, description="verifying", completed=done, total=total),
        )
    for warning in report.warnings:
        talk.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    for name, reason in report.tensors_ignored.items():
        talk.print(f"left out {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    talk.print(
        f"{report.tensors_written} tensors ({report.tensors_used} from {report.source}), "
        f"{report.visual_tokens} visual tokens per image, prompt format {report.chat_template}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    typer.echo(report.output)
