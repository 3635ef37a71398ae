"""`delta-llava train`."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change the recipe: num_visual_tokens=36, arguments.max_steps=10."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint, if there is one.")
    ] = False,
) -> None:
    """Train a model by a recipe, and print the path of the finished Hub folder.

    On several GPUs: `torchrun --nproc_per_node 8 -m transformers_delta_llava train RECIPE`, or
    `accelerate launch --config_file CONFIG -m transformers_delta_llava train RECIPE`.
    """
    # Workers encode one row at a time; tokenizers' threads do not survive a fork, and warn at length.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from accelerate import PartialState

    from .. import training  # takes seconds to import, which `--help` need not wait for

    main_process = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = training.train(training.load_recipe(recipe, changes or []), resume=resume)
    PartialState().destroy_process_group()  # its threads may abort a process that exits with them
    if main_process:
        typer.echo(folder)
