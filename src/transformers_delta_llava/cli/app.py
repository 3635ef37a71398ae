"""`delta-llava app`."""

from typing import Annotated

import typer


def show_app(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a Delta-LLaVA.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; by default the first free one from 7860.")
    ] = None,
    num_visual_tokens: Annotated[
        int | None, typer.Option(help="Where the slider stands at first; by default the model's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the longest answer.")] = 256,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision to run in: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Show a page to ask a model about pictures: answers as they come, a slider for the visual tokens, a heat map."""
    from transformers.utils.logging import disable_progress_bar  # these take seconds to import

    from ..serving import launch_app

    disable_progress_bar()
    launch_app(model, host, port, num_visual_tokens, device, dtype, max_new_tokens)
