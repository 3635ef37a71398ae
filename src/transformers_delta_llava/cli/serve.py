"""`delta-llava serve`."""

from typing import Annotated

import typer


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a Delta-LLaVA.", show_default=False)],
    num_visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens per image where a request does not say; by default the model's.")
    ] = None,
) -> None:
    """Serve a model over the OpenAI API with `transformers serve`, whose options it takes (--host, --port, --device ...)."""
    from ..serving import serve as serve_model  # takes seconds to import, which `--help` need not wait for

    serve_model(model, context.args, num_visual_tokens)
