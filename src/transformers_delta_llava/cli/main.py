"""Assembles the `delta-llava` command and turns what a user can mend into one sentence."""

import sys
from typing import Annotated

import typer

from .. import __version__
from .app import show_app
from .budget import budget
from .convert import convert
from .delta import delta
from .evaluate import evaluate
from .explain import explain
from .export import export
from .inspect import inspect
from .profile import profile
from .push import push
from .serve import serve
from .space import space
from .train import train


app = typer.Typer(name="delta-llava", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("app")(show_app)
app.command()(budget)
app.command()(convert)
app.add_typer(delta, name="delta")
app.add_typer(evaluate, name="evaluate")
app.command()(explain)
app.command()(export)
app.command()(inspect)
app.command()(profile)
app.command()(push)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command()(space)
app.command()(train)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Delta-LLaVA models: convert checkpoints into Hugging Face repos, publish them, train new ones."""


def main() -> None:
    """Entry point of `delta-llava` and of `python -m transformers_delta_llava`.

    Exits with code 2 and one sentence on stderr where the user can do something about it (`ValueError`, `OSError`).
    """
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"delta-llava: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
