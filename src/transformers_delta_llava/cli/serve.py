"""`delta-llava serve`, `app` and `space`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, MaxNewTokens, Model, Overwrite


InitialTokens = Annotated[
    int | None, typer.Option(help="Visual tokens that the slider starts at; by default the model's.")
]


def serve(
    context: typer.Context,
    model: Model,
    num_visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens per image where a request does not say; by default the model's.")
    ] = None,
) -> None:
    """Serve a model over the OpenAI API with `transformers serve`, whose options it takes (--host, --port, --device ...)."""
    from ..serving import serve as serve_model  # takes seconds to import, which `--help` need not wait for

    serve_model(model, context.args, num_visual_tokens)


def app(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; by default the first free one from 7860.")
    ] = None,
    num_visual_tokens: InitialTokens = None,
    max_new_tokens: MaxNewTokens = 256,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Start a demo app: streamed answers about images, a slider for the visual tokens, a saliency map."""
    from transformers.utils.logging import disable_progress_bar

    from ..serving import launch_app

    disable_progress_bar()
    launch_app(model, host, port, num_visual_tokens, device, dtype, max_new_tokens)


def space(
    folder: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    model: Annotated[
        str, typer.Option(metavar="ORG/NAME", help="Hub id of the Delta-LLaVA to show.", show_default=False)
    ],
    package_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Git URL, https://..., that the Space installs this package from; by default where it was installed from.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the Space; by default the model's name.")] = None,
    num_visual_tokens: InitialTokens = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a Hugging Face Space that runs the demo app, and print its path."""
    from ..serving import write_space

    write_space(folder, model, package_url, title, num_visual_tokens, overwrite)
    typer.echo(folder)
