"""`delta-llava profile`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import Json, print_json


if TYPE_CHECKING:
    from ..analysis import Floor, ModelProfile


def profile(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a Delta-LLaVA, or a shape: 0.5b, 7b, 13b.", show_default=False)
    ],
    num_visual_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Visual tokens per image; may be given several times; by default every budget of the grid."),
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, visual ones aside.")] = 68,
    new_tokens: Annotated[int, typer.Option(help="Tokens of the answer.")] = 30,
    dtype: Annotated[
        str, typer.Option(help="Precision that memory is counted for: float32, bfloat16 or float16.")
    ] = "bfloat16",
    flops_per_second: Annotated[
        float | None,
        typer.Option(help="What a device computes in that precision, such as 7e14; gives the shortest times."),
    ] = None,
    bytes_per_second: Annotated[
        float | None, typer.Option(help="Bandwidth of the device's memory, such as 3.35e12.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images, with a prompt each, that the shortest times are for.")] = 1,
    as_json: Json = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the operations: FILE.png or FILE.svg.", show_default=False)
    ] = None,
) -> None:
    """Operations, parameters and memory of each part at every budget, from the config alone: no weights are read."""
    from ..analysis import (  # these take seconds to import
        PAPER_NOTE,
        SHAPES,
        bar_plot,
        check_figure_path,
        load_config,
        profile_model,
        roofline,
        shape_config,
    )
    from ..utils.validation import torch_dtype

    if plot is not None:
        check_figure_path(plot)
    config = shape_config(model) if model in SHAPES else load_config(model)
    if (flops_per_second is None) != (bytes_per_second is None):
        raise ValueError("--flops-per-second and --bytes-per-second go together: the shortest time needs both rates.")
    result = profile_model(config, text_tokens, new_tokens, torch_dtype(dtype), num_visual_tokens)
    floors = []
    if flops_per_second is not None and bytes_per_second is not None:
        floors = roofline(result, flops_per_second, bytes_per_second, batch_size)
    if as_json:
        report = {"model": Path(model).name, **asdict(result), "note": PAPER_NOTE}
        print_json(report | ({"roofline": [asdict(floor) for floor in floors]} if floors else {}))
    else:
        _print_tables(result, PAPER_NOTE)
        if floors:
            _print_floors(floors, f"{flops_per_second:g} FLOP/s, {bytes_per_second:g} bytes/s, batch {batch_size}")
    if plot is not None:
        bars = {
            str(budget.num_visual_tokens): {part: flops / 1e12 for part, flops in budget.exact_flops.items()}
            for budget in result.budgets
        }
        bar_plot(bars, "TFLOPs per image and answer", "visual tokens per image", plot)


def _print_tables(result: "ModelProfile", note: str) -> None:
    console = Console()
    parameters = ", ".join(f"{name.replace('_', ' ')} {count / 1e6:,.1f}" for name, count in result.parameters.items())
    console.print(f"Million parameters: {parameters}", highlight=False, soft_wrap=True)
    setting = f"{result.text_tokens} text tokens, {result.new_tokens} new tokens"
    for title, field in (("Exact", "exact_flops"), ("The paper's formula", "paper_flops")):
        rows = {}
        for budget in result.budgets:
            flops = getattr(budget, field)
            flops = {**flops, "total": sum(flops.values())}
            rows[budget.num_visual_tokens] = {part: f"{number / 1e12:.4f}" for part, number in flops.items()}
        console.print(_table(f"{title}: TFLOPs, {setting}", rows))
    rows = {}
    for budget in result.budgets:
        sizes = {**budget.activation_bytes, "KV cache": budget.kv_cache_bytes}
        rows[budget.num_visual_tokens] = {part: f"{size / 1e6:,.1f}" for part, size in sizes.items()}
    console.print(_table(f"Peak of activations, and KV cache: MB in {result.dtype}", rows))
    console.print(note, highlight=False)


def _print_floors(floors: "list[Floor]", setting: str) -> None:
    rows = {}
    for floor in floors:
        times = {**floor.seconds, "first token": floor.first_token, "per token": floor.per_token}
        cells = {name: "" if seconds is None else f"{1000 * seconds:.3f}" for name, seconds in times.items()}
        cells["memory-bound"] = ", ".join(part for part, limit in floor.limited_by.items() if limit == "memory")
        rows[floor.num_visual_tokens] = cells
    Console().print(_table(f"Shortest times, ms: {setting}", rows))


def _table(title: str, rows: dict[int, dict[str, str]]) -> Table:
    table = Table("visual tokens", *next(iter(rows.values())), title=title, title_justify="left")
    for num_visual_tokens, cells in rows.items():
        table.add_row(str(num_visual_tokens), *cells.values())
    return table
