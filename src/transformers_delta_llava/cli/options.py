"""What several commands have in common: how they print, and types of their options."""

import re

from rich.console import Console
from rich.text import Text

from ..utils.errors import printable


def say(text: str, console: Console | None = None) -> None:
    """Print a sentence, by default on stderr."""
    console = console or Console(stderr=True)
    console.print(Text(printable(text)), soft_wrap=True)


def name_options(text: str) -> str:
    """A message of the package, with the options of the command where it names arguments: pass `overwrite=True`."""
    return re.sub(
        r"\b(pass|with) `([a-z_]+)(?:=True)?`", lambda match: f"{match[1]} --{match[2].replace('_', '-')}", text
    )


def cell(value: object) -> Text:
    """A cell or a title of a table."""
    return Text(printable(str(value)))


def number_or_word(text: str) -> int | str:
    """A number where the text is one, else the text: budgets may be `auto`, tokens may be words."""
    return int(text) if text.isdecimal() else text
