"""What several commands have in common: how they print, and types of their options."""

import re

from rich.console import Console
from rich.text import Text

from ..utils.errors import printable


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
    """A cell or a title of a table."""
    return Text(printable(str(value)))


def number_or_word(text: str) -> int | str:
    """A number where the text is one, else the text: budgets may be `auto`, tokens may be words."""
    return int(text) if text.isdecimal() else text
