"""`delta-llava space`."""

from pathlib import Path
from typing import Annotated

import typer


def space(
    folder: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    model: Annotated[
        str, typer.Option(metavar="ORG/NAME", help="Hub id of the Delta-LLaVA to show.", show_default=False)
    ],
    title: Annotated[str | None, typer.Option(help="Title of the Space; by default the model's name.")] = None,
    num_visual_tokens: Annotated[
        int | None, typer.Option(help="Where the slider stands at first; by default the model's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")] = False,
) -> None:
    """Write a Hugging Face Space that shows the page of `delta-llava app`, and print its path."""
    from ..serving import write_space  # takes seconds to import, which `--help` need not wait for

    write_space(folder, model, title, num_visual_tokens, overwrite)
    typer.echo(folder)
