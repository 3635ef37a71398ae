"""`delta-llava app`."""

from typing import Annotated

import typer

from .options import MaxNewTokens, Model, quiet


def app(
    model: Model,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="first free from 7860")] = None,
    max_new_tokens: MaxNewTokens = 256,
) -> None:
    """Serve a demo page: upload an image, ask, choose the number of visual tokens. Needs the extra `app`."""
    from ..app import launch

    quiet()
    launch(model, host, port, max_new_tokens)
