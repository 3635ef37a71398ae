"""`delta-llava budget`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import (
    AutoMaxLoss,
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
    from ..analysis import BudgetComparison


def budget(
    model: Model,
    image: Image,
    prompt: Prompt,
    num_visual_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Visual tokens, or auto; may be given several times; by default every budget."),
    ] = None,
    auto_max_loss: AutoMaxLoss = None,
    max_new_tokens: MaxNewTokens = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs, of which the median counts.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option(help="Write a figure as well: FILE.png or FILE.svg.", show_default=False)
    ] = None,
) -> None:
    """Ask one question at every number of visual tokens: answers and times side by side."""
    from transformers.utils.logging import disable_progress_bar  # these take seconds to import

    from ..analysis import check_figure_path, compare_budgets, load_image, load_repo, plot_comparison

    if output is not None:
        check_figure_path(output)
    disable_progress_bar()
    loaded_image = load_image(image)
    loaded, processor = load_repo(model, device, dtype)
    budgets = [number_or_word(word) for word in num_visual_tokens or []]
    with progress("running", (1 + repeats) * len(budgets or processor.visual_token_budgets)) as advance:
        comparison = compare_budgets(
            loaded, processor, loaded_image, prompt, budgets, auto_max_loss, max_new_tokens, repeats, advance
        )
    if as_json:
        print_json({"model": Path(model).name, **comparison.to_dict()})
    else:
        _print_table(comparison)
    if output is not None:
        plot_comparison(comparison, loaded_image, processor, Path(model).name, output)
        say(f"wrote {output}")


def _print_table(comparison: "BudgetComparison") -> None:
    table = Table(title=cell(comparison.prompt), caption=comparison.times, caption_justify="left")
    for name in ("visual tokens", "loss", "first token, ms", "total, ms", "answer tokens"):
        table.add_column(name, justify="right")
    table.add_column("answer", overflow="fold")
    for run in comparison.runs:
        tokens = f"auto: {run.num_visual_tokens}" if run.chosen_by_auto else str(run.num_visual_tokens)
        times = f"{run.first_token_ms:.1f}", f"{run.total_ms:.1f}"
        table.add_row(tokens, f"{run.loss:.2f}", *times, str(run.answer_tokens), cell(run.answer))
    Console().print(table)
