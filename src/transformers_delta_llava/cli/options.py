"""Options that several commands share, and how commands print."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


Model = Annotated[str, typer.Argument(help="Folder or Hub id of a Delta-LLaVA repo.", show_default=False)]
HubRevision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub repo.")]
MaxNewTokens = Annotated[int, typer.Option(help="Length of the longest answer, in tokens.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="the accelerator where there is one")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="bfloat16, on the CPU float32")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")]
ShardSize = Annotated[str, typer.Option(help="Size of the largest weight file.")]


def say(text: str, console: Console | None = None) -> None:
    """Print a line, by default on stderr."""
    console = console or Console(stderr=True)
    console.print(Text(text), soft_wrap=True)


def cell(value: object) -> Text:
    """A cell or a title of a table, without markup."""
    return Text(str(value))


def print_json(report: Any) -> None:
    """Print `report` on stdout."""
    typer.echo(json.dumps(report, indent=2))


def number_or_word(text: str) -> int | str:
    """A number where the text is one, else the text, such as `auto`."""
    return int(text) if text.isdecimal() else text


@contextmanager
def progress(description: str, total: int | None = None, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on stderr, if that is a terminal. Yields rich's `update`: `advance=1`, `completed=10, total=20`, `description=...`."""
    console = Console(stderr=True)
    counts = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    columns = TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield partial(bar.update, bar.add_task(description, total=total))


def quiet() -> None:
    """Turn off the progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
