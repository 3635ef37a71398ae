"""transformers' `TrainingArguments`, from a recipe."""

import dataclasses
from typing import Any

from transformers import TrainingArguments

from .errors import RecipeError
from .recipe import suggestion


# What a recipe need not say.
DEFAULTS = {
    "report_to": "none",
    "logging_steps": 10,
    "ddp_find_unused_parameters": False,  # what is trained gets a gradient in every step, see the collator
    "remove_unused_columns": False,
}
# Renamed in transformers; recipes run on all versions supported.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def check_arguments(arguments: dict[str, Any]) -> None:
    """
    Check the names of training arguments, and the few that the trainer decides itself.

    Raises:
        RecipeError: an unknown argument, or one that cannot be used.
    """
    known = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    known += [name for pair in RENAMED.items() for name in pair]
    for name in arguments:
        if name not in known:
            raise RecipeError(f"arguments.{name} is no training argument of transformers{suggestion(name, known)}.")
    if not arguments.get("output_dir"):
        raise RecipeError("arguments.output_dir is missing: name the folder to write to.")
    if arguments.get("remove_unused_columns"):
        raise RecipeError("arguments.remove_unused_columns=true would drop the images: leave it out.")
    if arguments.get("train_sampling_strategy") == "batch_rebalance":
        raise RecipeError(
            "arguments.train_sampling_strategy=batch_rebalance: use group_by_length, random or sequential."
        )


def make_arguments(arguments: dict[str, Any]) -> TrainingArguments:
    """
    The arguments of the trainer.

    Raises:
        RecipeError: a value that transformers refuses.
    """
    known = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    values = {**DEFAULTS, **arguments}
    for old, new in RENAMED.items():
        if new in known and old in values:
            values.setdefault(new, values.pop(old))
        elif new not in known and new in values:
            values.setdefault(old, values.pop(new))
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    if values.get(checkpointing):
        # The reentrant form needs inputs with gradients, which a frozen embedding does not give.
        values.setdefault(f"{checkpointing}_kwargs", {"use_reentrant": False})
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"arguments: {' '.join(str(error).split())}") from error
