"""`delta-llava budget`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from .options import number_or_word


if TYPE_CHECKING:
    from ..analysis import BudgetComparison


def budget(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a Delta-LLaVA.", show_default=False)],
    image: Annotated[str, typer.Argument(help="Picture: a file or a URL.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What to ask about it.", show_default=False)],
    num_visual_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Visual tokens, or auto; may be given several times; by default all that there are."),
    ] = None,
    auto_max_loss: Annotated[
        float | None, typer.Option(help="What auto may lose of the picture, 0 to 1; by default the model's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the longest answer.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs, of which the median counts.")] = 3,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision to run in: float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write a page or a picture as well: FILE.html or FILE.png.", show_default=False)
    ] = None,
) -> None:
    """Ask one question at every number of visual tokens: answers and times side by side."""
    from transformers.utils.logging import disable_progress_bar  # these take seconds to import

    from ..analysis import compare_budgets, load_picture, load_repo, write_comparison
    from ..analysis.figures import SUFFIXES, check_output

    if output is not None:
        check_output(output, SUFFIXES)
    disable_progress_bar()
    picture = load_picture(image)
    loaded, processor = load_repo(model, device, dtype)
    wanted = [number_or_word(word) for word in num_visual_tokens or []]
    talk = Console(stderr=True)
    with Progress(console=talk, transient=True, disable=not talk.is_terminal) as bar:
        task = bar.add_task("asking", total=(1 + repeats) * len(wanted or processor.visual_token_budgets))
        found = compare_budgets(
            loaded,
            processor,
            picture,
            prompt,
            wanted,
            auto_max_loss,
            max_new_tokens,
            repeats,
            lambda: bar.advance(task),
        )
    if as_json:
        typer.echo(json.dumps({"model": Path(model).name, **found.to_dict()}, indent=2))
    else:
        _print(found)
    if output is not None:
        write_comparison(found, picture, processor, Path(model).name, output)
        talk.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)


def _print(found: "BudgetComparison") -> None:
    table = Table(title=Text(found.prompt), caption=found.times, caption_justify="left")
    for name in ("visual tokens", "loss", "first token, ms", "in all, ms", "tokens said"):
        table.add_column(name, justify="right")
    table.add_column("answer", overflow="fold")
    for run in found.runs:
        tokens = f"auto: {run.visual_tokens}" if run.picked else str(run.visual_tokens)
        times = f"{run.first_token_ms:.1f}", f"{run.total_ms:.1f}"
        # Text, as an answer may hold what rich takes for markup.
        table.add_row(tokens, f"{run.loss:.2f}", *times, str(run.answer_tokens), Text(run.answer))
    Console().print(table)
