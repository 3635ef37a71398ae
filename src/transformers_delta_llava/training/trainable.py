"""What is trained: the `train` list of a recipe, applied to a model."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..modeling import DeltaLlavaForConditionalGeneration
from ..utils.errors import one_line, shorten
from .errors import RecipeError


# Parameters by name. A PEFT wrapper puts its own names in front of and between these.
PATTERNS = {
    "vision_tower": re.compile(r"(^|\.)vision_tower\."),
    "projector": re.compile(r"(^|\.)multi_modal_projector\."),
    "deltas": re.compile(r"(^|\.)multi_modal_projector\..*delta_[uv]$"),
    "language_model": re.compile(r"(^|\.)(language_model|lm_head)\."),
}
VISION_PARTS = {
    "vision_tower": "vision_tower",
    "projector": "multi_modal_projector",
    "deltas": "multi_modal_projector",
}
# LLaVA's own LoRA recipe.
LORA_DEFAULTS = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05}


def select_trainable(
    model: DeltaLlavaForConditionalGeneration, train: Sequence[str], lora: dict[str, Any]
) -> nn.Module:
    """
    Leave gradients on for what is trained, in float32, and off for everything else.

    Layers of the vision tower above the deepest one that the projector reads are never trained: they are not run. With
    LoRA, PEFT decides what `lora` trains (adapters, `modules_to_save`, biases, tokens), and what else `train` names is
    saved beside the adapters.

    Args:
        model: the whole model, on the CPU or a device.
        train: a recipe's list.
        lora: arguments of PEFT's `LoraConfig`; by default LLaVA's rank and alpha on every linear layer of the language
            model. Adapters never lie on the projector, nor on layers that are not run.

    Returns:
        The model, or with `lora` a `PeftModel` around it.

    Raises:
        RecipeError: nothing is left to train, something would be trained and not saved, or a bad argument of LoRA.
    """
    patterns = [PATTERNS[name] for name in train if name != "lora"]
    unused = _unused_layers(model)
    trained: nn.Module = model
    asked = frozenset[str]()
    if "lora" in train:
        asked = frozenset(lora.get("modules_to_save") or ())
        trained = _add_lora(model, train, lora, unused)
    for name, parameter in trained.named_parameters():
        plain = name.replace("modules_to_save.default.", "")
        wanted = any(pattern.search(plain) for pattern in patterns)
        if "lora" in train and not wanted:
            # What `train` puts among the modules to save is trained as far as `train` says, the rest as PEFT says.
            ours = ".modules_to_save." in name and not any(f".{module}." in f".{name}" for module in asked)
            wanted = parameter.requires_grad and not ours
        parameter.requires_grad_(wanted and ".original_module." not in name and not unused.search(plain))
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    names = [name.replace("modules_to_save.default.", "") for name in trained_names(trained)]
    for entry in train:
        if entry != "lora" and not any(PATTERNS[entry].search(name) for name in names):
            raise RecipeError(f"train names {entry}, but this model has no such parameters: leave it out.")
    if "lora" in train:
        _check_saved(trained)
    return trained


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def trains_vision(model: nn.Module) -> bool:
    """Whether something is trained that only images reach."""
    names = trained_names(model)
    return any(PATTERNS[part].search(name) for part in ("vision_tower", "projector") for name in names)


def _unused_layers(model: DeltaLlavaForConditionalGeneration) -> re.Pattern[str]:
    """Names of the tower's parameters that no visual token depends on."""
    config = model.config
    layers = config.vision_config.num_hidden_layers
    levels = (config.vision_feature_layer, *config.vision_feature_levels)
    deepest = max(level % (layers + 1) for level in levels)
    above = "|".join(str(index) for index in range(deepest, layers)) or "none"
    return re.compile(rf"vision_tower\.(.*\.)?(layers?\.({above})\.|post_layernorm\.|head\.)")


def _add_lora(
    model: DeltaLlavaForConditionalGeneration, train: Sequence[str], lora: dict[str, Any], unused: re.Pattern[str]
) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = {**LORA_DEFAULTS, **lora}
    if settings.get("target_modules") is None and settings.get("target_parameters") is None:
        linear = {
            name.rpartition(".")[2]
            for name, module in model.model.language_model.named_modules()
            if isinstance(module, nn.Linear)
        }
        settings["target_modules"] = rf".*\.language_model\..*\.({'|'.join(sorted(linear))})"
    else:
        excluded = [rf".*multi_modal_projector.*|.*({unused.pattern}).*"]
        given = settings.get("exclude_modules")
        if isinstance(given, str):
            excluded.append(given)
        elif given:
            excluded.append(rf"(.*\.)?({'|'.join(map(re.escape, given))})")
        settings["exclude_modules"] = "|".join(f"({pattern})" for pattern in excluded)
    asked = list(settings.get("modules_to_save") or ())
    modules = [name for name, _ in model.named_modules()]
    for module in asked:
        if not any(name.endswith(module) for name in modules):
            raise RecipeError(f"lora.modules_to_save: this model has no module {shorten(module)}.")
    whole = sorted({VISION_PARTS[name] for name in train if name in VISION_PARTS} - set(asked))
    settings["modules_to_save"] = asked + whole or None
    try:
        return get_peft_model(model, LoraConfig(**settings))
    except Exception as error:  # of every kind: PEFT checks little of what it is given
        raise RecipeError(f"lora: {one_line(error)}.") from error


def _check_saved(model: nn.Module) -> None:
    """Refuse to train what PEFT would not write into the adapter."""
    from peft import get_peft_model_state_dict

    saved = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    trained = {name: model.get_parameter(name) for name in trained_names(model)}
    lost: Iterable[str] = (name for name, parameter in trained.items() if parameter.data_ptr() not in saved)
    if name := next(iter(lost), None):
        raise RecipeError(f"lora: {name} would be trained, but PEFT does not save it with the adapter: leave it out.")
