"""transformers' `TrainingArguments` and PEFT's `LoraConfig`, from what a recipe says."""

import dataclasses
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..utils.errors import one_line, shorten, suggestion
from .errors import RecipeError


# What a recipe need not say.
DEFAULTS = {
    "report_to": "none",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a loss that is no number is an error here, not a gap in the log
    "ddp_find_unused_parameters": False,  # what is trained gets a gradient in every step, see the collator
    "remove_unused_columns": False,
}
# Renamed in transformers; recipes run on all versions supported.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Arguments that cannot be used, the values that do no harm, and what to do instead.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "remove_unused_columns": ((False,), "it would drop the images; leave it out"),
    "train_sampling_strategy": (("group_by_length", "random", "sequential"), "use one of these"),
    "eval_strategy": (("no", None), "a recipe names no evaluation data; evaluate the finished folder"),
    "eval_on_start": ((False,), "a recipe names no evaluation data; evaluate the finished folder"),
    "load_best_model_at_end": ((False,), "a recipe names no evaluation data to tell the best by; leave it out"),
    "save_strategy": (("no", "steps", "epoch"), "use one of these"),
    "auto_find_batch_size": ((False,), "rows, budgets and resumed runs depend on the batch size; choose one"),
    "push_to_hub": ((False,), "publish the finished folder with `delta-llava push`, which checks it first"),
}
# The smallest values, where transformers does not check.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "label_smoothing_factor": 0,
    "warmup_steps": 0,
    "max_steps": -1,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
# Other starts change the weights beneath the adapter, so that it fits no other copy of the model.
LORA_STARTS = (True, False, "gaussian", "orthogonal")


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Training arguments in the types that transformers declares.

    Raises:
        ValueError: an unknown argument, a bad value, or one that cannot be used here.
    """
    renamed = {old: new for pair in RENAMED.items() for old, new in (pair, pair[::-1])}
    known = _model(TrainingArguments).model_fields
    current = {name if name in known else renamed.get(name, name): name for name in arguments}
    values = {new: arguments[name] for new, name in current.items()}
    # YAML 1.1 takes `no` for false.
    values = {name: "no" if v is False and name.endswith("_strategy") else v for name, v in values.items()}
    checked = _check(TrainingArguments, values)
    checked = {current[new]: value for new, value in checked.items()}
    if not checked.get("output_dir"):
        raise ValueError("output_dir is missing: name the folder to write to")
    for name, (allowed, instead) in REFUSED.items():
        if name in checked and checked[name] not in allowed:
            choices = f" ({', '.join(map(str, allowed))})" if instead == "use one of these" else ""
            raise ValueError(f"{name}={shorten(checked[name])}: {instead}{choices}")
    return checked


def check_lora(lora: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of LoRA in the types that PEFT declares.

    Raises:
        ValueError: PEFT is missing, an unknown argument, a bad value, or one that cannot be used here.
    """
    if not lora:
        return lora
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("it needs PEFT: pip install 'transformers-delta-llava[train]'") from error
    checked = _check(LoraConfig, lora)
    start = checked.get("init_lora_weights", True)
    if start not in LORA_STARTS:
        raise ValueError(f"init_lora_weights={start}: it changes the weights beneath the adapter; leave it out")
    if checked.get("inference_mode"):
        raise ValueError("inference_mode=True trains nothing; leave it out")
    return checked


def make_arguments(arguments: dict[str, Any]) -> TrainingArguments:
    """
    The arguments of the trainer.

    Raises:
        RecipeError: a value that transformers refuses, or a logger that is not installed.
    """
    known = _model(TrainingArguments).model_fields
    values = {**DEFAULTS, **arguments}
    for old, new in RENAMED.items():
        if new in known and old in values:
            values.setdefault(new, values.pop(old))
        elif new not in known and new in values:
            values.setdefault(old, values.pop(new))
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    if values.get(checkpointing):
        # The reentrant form needs inputs with gradients, which a frozen embedding does not give.
        values[f"{checkpointing}_kwargs"] = {"use_reentrant": False, **(values.get(f"{checkpointing}_kwargs") or {})}
    try:
        made = TrainingArguments(**values)
    except Exception as error:  # of every kind: transformers takes some of these values apart without a check
        raise RecipeError(f"arguments: {one_line(error)}.") from error
    for logger in made.report_to:
        if logger not in get_available_reporting_integrations():
            raise RecipeError(
                f"arguments.report_to={shorten(logger)}: pip install {shorten(logger)}, or leave it out."
            )
    return made


def _check(target: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values` as arguments of a dataclass, each in its declared type.

    Raises:
        ValueError: an unknown argument, or a bad value.
    """
    model = _model(target)
    for name in values:
        if name not in model.model_fields:
            known = suggestion(name, list(model.model_fields))
            raise ValueError(f"{shorten(name)} is not an argument of {target.__name__}{known}")
    try:
        return model.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ValueError(one_line(error)) from error


@cache
def _model(target: type) -> type[BaseModel]:
    """A dataclass of another library as a model of pydantic; unlike it, it checks types."""
    hints = get_type_hints(target)
    fields: dict[str, Any] = {
        item.name: (
            Annotated[hints[item.name], Field(ge=AT_LEAST[item.name])] if item.name in AT_LEAST else hints[item.name],
            None,
        )
        for item in dataclasses.fields(target)
        if item.init
    }
    settings = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=())
    return create_model(target.__name__, __config__=settings, **fields)
