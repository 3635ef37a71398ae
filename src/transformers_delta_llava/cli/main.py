"""Assembles the `delta-llava` command and turns what a user can mend into one sentence."""

import sys
import traceback
from typing import Annotated

import typer

from .. import __version__
from ..utils.errors import one_line
from .budget import budget
from .convert import convert
from .delta import delta
from .evaluate import evaluate
from .explain import explain
from .export import export
from .inspect import inspect
from .options import name_options
from .profile import profile
from .push import push
from .serve import app as serve_app
from .serve import serve, space
from .train import train
from .update import update


app = typer.Typer(name="delta-llava", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("app")(serve_app)
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
app.command()(update)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error, too; may stand anywhere.")
    ] = False,
) -> None:
    """Delta-LLaVA models: convert checkpoints into Hugging Face repos, publish them, train new ones."""


def main() -> None:
    """Entry point of `delta-llava` and of `python -m transformers_delta_llava`.

    An error is one sentence on stderr, after its traceback with `--debug`. The exit code is 2 where the user can do
    something about it (`ValueError`, `OSError`, `ImportError`), and 1 for anything else, which is a fault of this package.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust libraries panic with an exception that is not an Exception
        if debug:
            traceback.print_exception(error)
        usual = isinstance(error, (ValueError, OSError, ImportError))
        print(f"delta-llava: {_sentence(error) if usual else _describe_fault(error)}", file=sys.stderr)
        sys.exit(2 if usual else 1)


def _sentence(error: BaseException) -> str:
    # Our own errors end with a full stop; what libraries raise is left as it is.
    text = name_options(one_line(error, limit=2500))
    return f"{text}." if str(error).rstrip().endswith(".") else text


def _describe_fault(error: BaseException) -> str:
    kind, text = type(error).__name__, one_line(error)
    if "OutOfMemory" in kind or isinstance(error, MemoryError):
        return f"There is not enough memory ({text})."
    what = kind if text == kind else f"{kind}: {text}"
    return f"This should not happen ({what}); run it again with --debug and report what it prints."
