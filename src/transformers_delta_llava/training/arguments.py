"""`TrainingArguments` and `LoraConfig` in recipes: types checked, and what does not work here refused."""

import dataclasses
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..utils.errors import RecipeError, one_line, shorten, suggestion
from .sampler import STRATEGIES


DEFAULTS = {
    "report_to": "none",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a loss of nan or inf is an error here, not a gap in the log
    "ddp_find_unused_parameters": False,  # every trained parameter has a gradient in every step, see `Collator`
    "remove_unused_columns": False,
}
# Old and new names in transformers: a recipe may use either on every supported version.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Arguments of which only some values work here, those values, and what to do instead of the others.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "remove_unused_columns": ((False,), "it would drop the images; leave it out"),
    "train_sampling_strategy": (STRATEGIES, "use one of these"),
    "eval_strategy": (("no", None), "a recipe has no evaluation data; evaluate the finished folder"),
    "eval_on_start": ((False,), "a recipe has no evaluation data; evaluate the finished folder"),
    "load_best_model_at_end": ((False,), "a recipe has no evaluation data to compare checkpoints by; leave it out"),
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
# Other initialisations change the base weights, so that the adapter does not fit the original model.
LORA_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Training arguments in the types that transformers declares.

    Raises:
        ValueError: an unknown argument, a bad value, or one that cannot be used here.
    """
    # YAML 1.1 reads `no` as false.
    values = {n: "no" if v is False and n.endswith("_strategy") else v for n, v in arguments.items()}
    checked = _check_types(TrainingArguments, {_installed_name(name): value for name, value in values.items()})
    if not checked.get("output_dir"):
        raise ValueError("output_dir is missing: name the folder to write to")
    for name, (allowed, instead) in REFUSED.items():
        if name in checked and checked[name] not in allowed:
            choices = f" ({', '.join(map(str, allowed))})" if instead == "use one of these" else ""
            raise ValueError(f"{name}={shorten(checked[name])}: {instead}{choices}")
    return checked


def check_lora(lora: dict[str, Any]) -> dict[str, Any]:
    """
    LoRA arguments in the types that PEFT declares.

    Raises:
        ValueError: PEFT is missing, an unknown argument, a bad value, or one that cannot be used here.
    """
    if not lora:
        return lora
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("it needs PEFT: pip install 'transformers-delta-llava[train]'") from error
    checked = _check_types(LoraConfig, lora)
    initialisation = checked.get("init_lora_weights", True)
    if initialisation not in LORA_INITIALISATIONS:
        raise ValueError(f"init_lora_weights={initialisation}: it changes the base weights; leave it out")
    if checked.get("inference_mode"):
        raise ValueError("inference_mode=True trains nothing; leave it out")
    return checked


def make_arguments(arguments: dict[str, Any]) -> TrainingArguments:
    """
    `TrainingArguments` from the checked arguments of a recipe.

    Raises:
        RecipeError: a value that transformers refuses, or a logger that is not installed.
    """
    values = {**DEFAULTS, **arguments}
    checkpointing = _installed_name("gradient_checkpointing")
    if values.get(checkpointing):
        # The reentrant form needs inputs with gradients, which a frozen embedding does not give.
        values[f"{checkpointing}_kwargs"] = {"use_reentrant": False, **(values.get(f"{checkpointing}_kwargs") or {})}
    try:
        training_arguments = TrainingArguments(**values)
    except Exception as error:  # of any type: transformers uses some values unchecked
        raise RecipeError(f"arguments: {one_line(error)}.") from error
    for logger in training_arguments.report_to:
        if logger not in get_available_reporting_integrations():
            raise RecipeError(
                f"arguments.report_to={shorten(logger)}: pip install {shorten(logger)}, or leave it out."
            )
    return training_arguments


def _installed_name(name: str) -> str:
    """What the installed transformers calls a training argument that was renamed."""
    for old, new in RENAMED.items():
        if name in (old, new):
            return new if new in _model(TrainingArguments).model_fields else old
    return name


def _check_types(target: type, values: dict[str, Any]) -> dict[str, Any]:
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
    """A pydantic model with the fields of a dataclass, which itself does not check types."""
    hints = get_type_hints(target)
    for name, least in AT_LEAST.items():
        if name in hints:
            hints[name] = Annotated[hints[name], Field(ge=least)]
    fields: dict[str, Any] = {item.name: (hints[item.name], None) for item in dataclasses.fields(target) if item.init}
    settings = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=())
    return create_model(target.__name__, __config__=settings, **fields)
