"""`delta-llava explain`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import (
    Device,
    Dtype,
    HubRevision,
    Json,
    MaxNewTokens,
    Model,
    cell,
    number_or_word,
    print_json,
    quiet,
    say,
)


class Positions(str, Enum):
    """Where saliency is computed."""

    visual_tokens = "visual_tokens"
    patches = "patches"


def explain(
    model: Model,
    image: Annotated[str, typer.Argument(help="Image: a file or a URL.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Question about the image.", show_default=False)],
    num_visual_tokens: Annotated[
        list[str] | None,
        typer.Option(help="One panel for each: numbers, or auto.", show_default="the repo's and the next two"),
    ] = None,
    token: Annotated[str, typer.Option(help="Token of the answer: its position, or a word.")] = "0",
    on: Annotated[Positions, typer.Option(help="With 1 visual token only patches show something.")] = (
        Positions.visual_tokens
    ),
    max_new_tokens: MaxNewTokens = 64,
    output: Annotated[Path, typer.Option("--output", "-o", help="Figure to write, .png or .svg.")] = Path(
        "explain.png"
    ),
    revision: HubRevision = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Draw which parts of an image an answer depends on, at several numbers of visual tokens. Needs the extra `plots`."""
    from transformers.image_utils import load_image

    from ..explain import explain, plot_explanations
    from ..loading import load_repo

    quiet()
    picture = load_image(image)
    loaded, processor = load_repo(model, device, dtype, revision)
    smaller = [number for number in processor.visual_token_budgets if number <= processor.image_seq_length]
    numbers = [number_or_word(word) for word in num_visual_tokens or map(str, smaller[:3])]
    explanations = [
        explain(loaded, processor, picture, prompt, number, number_or_word(token), on.value, max_new_tokens)
        for number in numbers
    ]
    plot_explanations(picture, explanations, processor, prompt, output)
    if as_json:
        print_json([{**vars(run), "saliency": run.saliency.tolist()} for run in explanations])
    else:
        table = Table("visual tokens", "explained", "answer")
        for run in explanations:
            table.add_row(str(run.num_visual_tokens), cell(run.token), cell(run.answer))
        Console().print(table)
    say(f"wrote {output}")
