"""Options that several commands have, and how commands print."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from ..utils.errors import printable


Model = Annotated[str, typer.Argument(help="Folder or Hub id of a Delta-LLaVA.", show_default=False)]
Image = Annotated[str, typer.Argument(help="Image: a file or a URL.", show_default=False)]
Prompt = Annotated[str, typer.Argument(help="Question about the image.", show_default=False)]
AutoMaxLoss = Annotated[
    float | None, typer.Option(help="What auto may lose of the image, 0 to 1; by default the model's.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Length of the longest answer.")]
Device = Annotated[str, typer.Option(help="Device to run on.")]
Dtype = Annotated[str, typer.Option(help="Precision to run in: float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")]
ShardSize = Annotated[str, typer.Option(help="Most bytes per weight file.")]


def say(text: str, console: Console | None = None) -> None:
    """Print a sentence, by default on stderr."""
    console = console or Console(stderr=True)
    console.print(Text(printable(name_options(text))), soft_wrap=True)


# An argument as the library's messages name it: `base_model=...`, `overwrite=True`.
_ARGUMENT = re.compile(r"`([a-z_]+)=(?:\.\.\.|True)`")


def name_options(text: str) -> str:
    """A message of the library with the Python arguments in it as options: `--base-model`."""
    return _ARGUMENT.sub(lambda match: "--" + match[1].replace("_", "-"), text)


def cell(value: object) -> Text:
    """A cell or a title of a table: text of models and files is no markup."""
    return Text(printable(str(value)))


def print_json(report: Any) -> None:
    """Print `report` on stdout."""
    typer.echo(json.dumps(report, indent=2))


def number_or_word(text: str) -> int | str:
    """A number where the text is one, else the text: budgets may be `auto`, tokens may be words."""
    return int(text) if text.isdecimal() else text


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on stderr, where that is a terminal. Yields a function that advances it, by 1 or by a number of steps."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield partial(bar.advance, task)
