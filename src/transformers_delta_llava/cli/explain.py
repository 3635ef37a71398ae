"""`delta-llava explain`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import (
    Device,
    Dtype,
    Image,
    Json,
    MaxNewTokens,
    Model,
    Prompt,
    cell,
    number_or_word,
    print_json,
    progress,
    say,
)


if TYPE_CHECKING:
    from ..analysis import Explanation


def explain(
    model: Model,
    image: Image,
    prompt: Prompt,
    num_visual_tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Visual tokens, or auto; may be given several times; by default the model's own number and the next two."
        ),
    ] = None,
    token: Annotated[
        str, typer.Option(help="What to explain of the answer: a position, from 0, or a word of it.")
    ] = "0",
    on: Annotated[
        str,
        typer.Option(help="Where to look: visual_tokens, or patches (the one to see anything with 1 visual token)."),
    ] = "visual_tokens",
    max_new_tokens: MaxNewTokens = 64,
    output: Annotated[Path, typer.Option(help="Figure to write: FILE.png or FILE.svg.")] = Path("explain.png"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Show which parts of an image an answer comes from, at several numbers of visual tokens side by side."""
    from transformers.utils.logging import disable_progress_bar  # these take seconds to import

    from ..analysis import check_figure_path, explain_budgets, load_image, load_repo, plot_explanations
    from ..analysis.explain import check_question

    check_figure_path(output)
    check_question(prompt, on, max_new_tokens)
    disable_progress_bar()
    loaded_image = load_image(image)
    loaded, processor = load_repo(model, device, dtype)
    budgets = [number_or_word(word) for word in dict.fromkeys(num_visual_tokens or [])]
    with progress("explaining", len(budgets) or None) as advance:
        explanations = explain_budgets(
            loaded, processor, loaded_image, prompt, budgets, number_or_word(token), on, max_new_tokens, advance
        )
    plot_explanations(loaded_image, explanations, processor, prompt, output, on)
    if as_json:
        runs = [{**vars(run), "saliency": run.saliency.tolist()} for run in explanations]
        print_json({"model": Path(model).name, "prompt": prompt, "on": on, "runs": runs})
    else:
        _print_table(prompt, explanations)
    say(f"wrote {output}")


def _print_table(prompt: str, explanations: "list[Explanation]") -> None:
    table = Table(title=cell(prompt))
    table.add_column("visual tokens", justify="right")
    table.add_column("explained", overflow="fold")
    table.add_column("answer", overflow="fold")
    for run in explanations:
        table.add_row(str(run.num_visual_tokens), cell(run.token), cell(run.answer))
    Console().print(table)
