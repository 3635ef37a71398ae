"""The `delta-llava` command: its subcommands, and the one place where an exception becomes a line on stderr."""

import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import DeltaLlavaError, one_line
from .app import app as app_command
from .convert import convert
from .delta import delta
from .explain import explain
from .export import export
from .generate import generate
from .inspect import inspect
from .push import push
from .train import train
from .update import update


app = typer.Typer(
    name="delta-llava",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PANELS: dict[str, dict[str, Any]] = {
    "Use": {"generate": generate, "explain": explain, "app": app_command},
    "Publish": {"convert": convert, "inspect": inspect, "push": push, "update": update, "export": export},
    "Train": {"train": train},
}
for panel, commands in PANELS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)
app.add_typer(delta, name="delta", rich_help_panel="Train")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error; works anywhere.")] = False,
) -> None:
    """Delta-LLaVA models: ask them, convert and publish checkpoints, train new ones."""


# Options that take several values, and what a value looks like.
_SEVERAL = {
    "--num-visual-tokens": r"\d+|auto|low|high",
    "--budgets": r"\d+",
    "--dtype": r"fp32|fp16|q8|q4|float32|bfloat16|float16",
}


def split_values(arguments: Sequence[str]) -> list[str]:
    """Repeat an option for each of its values: `--num-visual-tokens 16 4` becomes `--num-visual-tokens 16 --num-visual-tokens 4`."""
    repeated: list[str] = []
    option = None
    for argument, before in zip(arguments, ["", *arguments]):
        if option and before != option and re.fullmatch(_SEVERAL[option], argument):
            repeated.append(option)
        elif before != option:
            option = argument if argument in _SEVERAL else None
        repeated.append(argument)
    return repeated


def main() -> None:
    """
    Entry point of `delta-llava` and of `python -m transformers_delta_llava`.

    An exception is one line on stderr, after its traceback with `--debug`. The exit code is 2 for what the user can change
    (`ValueError`, `OSError`, `ImportError`), and 1 for anything else.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console may have few characters
    try:
        app(split_values(arguments))
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # Rust libraries panic with an exception that is not an Exception
        if "--debug" in sys.argv:
            traceback.print_exception(error)
        kind = "" if isinstance(error, DeltaLlavaError) else f"{type(error).__name__}: "
        option = re.compile(r"\b([a-z_]+)=True\b")  # such as overwrite=True
        text = option.sub(lambda match: "--" + match[1].replace("_", "-"), one_line(error))
        print(f"delta-llava {arguments[0]}: {kind}{text}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ValueError, OSError, ImportError)) else 1)
