"""`delta-llava explain`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from .options import number_or_word


if TYPE_CHECKING:
    from ..analysis import Explanation


def explain(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a Delta-LLaVA.", show_default=False)],
    image: Annotated[str, typer.Argument(help="Picture: a file or a URL.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What to ask about it.", show_default=False)],
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
    max_new_tokens: Annotated[int, typer.Option(help="Length of the longest answer.")] = 64,
    output: Annotated[Path, typer.Option(help="Picture to write: FILE.png or FILE.jpg.")] = Path("explain.png"),
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision to run in: float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the heat, instead of a table.")] = False,
) -> None:
    """Show which parts of a picture an answer comes from, at several numbers of visual tokens side by side."""
    from transformers.utils.logging import disable_progress_bar  # these take seconds to import

    from .. import analysis
    from ..analysis.explain import check_question, default_budgets
    from ..analysis.figures import EXPLAIN_SUFFIXES, check_output, write_picture
    from ..analysis.inference import encode_question
    from ..utils.prompts import max_prompt_tokens

    check_output(output, EXPLAIN_SUFFIXES)
    check_question(prompt, on, max_new_tokens)
    disable_progress_bar()
    picture = analysis.load_picture(image)
    loaded, processor = analysis.load_repo(model, device, dtype)
    wanted = [number_or_word(word) for word in dict.fromkeys(num_visual_tokens or [])]
    for budget in wanted:  # refuses what it is not, before anything runs
        encode_question(processor, picture, prompt, budget, max_tokens=max_prompt_tokens(loaded.config))
    talk = Console(stderr=True)
    found = [
        analysis.explain(loaded, processor, picture, prompt, budget, number_or_word(token), on, max_new_tokens)
        for budget in track(
            wanted or default_budgets(processor),
            "explaining",
            console=talk,
            transient=True,
            disable=not talk.is_terminal,
        )
    ]
    write_picture(analysis.draw_explanations(picture, found, processor, prompt, on), output)
    if as_json:
        runs = [{**vars(run), "heat": run.heat.tolist()} for run in found]
        typer.echo(json.dumps({"model": Path(model).name, "prompt": prompt, "on": on, "runs": runs}, indent=2))
    else:
        _print(prompt, found)
    talk.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)


def _print(prompt: str, found: "list[Explanation]") -> None:
    table = Table(title=Text(prompt))
    table.add_column("visual tokens", justify="right")
    table.add_column("explained", overflow="fold")
    table.add_column("answer", overflow="fold")
    for run in found:
        # Text, as an answer may hold what rich takes for markup.
        table.add_row(str(run.num_visual_tokens), Text(run.token), Text(run.answer))
    Console().print(table)
