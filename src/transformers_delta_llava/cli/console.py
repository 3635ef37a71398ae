"""How commands print: names from files are text, neither markup nor commands to the terminal."""

from rich.console import Console
from rich.text import Text

from ..utils.errors import printable


def say(text: str, console: Console | None = None) -> None:
    """Print a sentence, by default on stderr."""
    console = console or Console(stderr=True)
    console.print(Text(printable(text)), soft_wrap=True)


def cell(value: object) -> Text:
    """A cell or a title of a table."""
    return Text(printable(str(value)))
