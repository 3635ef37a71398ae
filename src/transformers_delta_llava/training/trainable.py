"""What is trained: the `train` list of a recipe, applied to a model."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..modeling import DeltaLlavaForConditionalGeneration
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

    Layers of the vision tower above the deepest one that the projector reads are never trained: they are not run.

    Args:
        model: the whole model, on the CPU or a device.
        train: some of `recipe.TRAINABLE`.
        lora: arguments of PEFT's `LoraConfig`; by default LLaVA's rank and alpha on every linear layer of the language
            model.

    Returns:
        The model, or with `lora` a `PeftModel` around it.

    Raises:
        RecipeError: nothing is left to train, PEFT is missing, or a bad argument of LoRA.
    """
    patterns = [PATTERNS[name] for name in train if name != "lora"]
    trained: nn.Module = _add_lora(model, train, lora) if "lora" in train else model
    unused = _unused_layers(model)
    for name, parameter in trained.named_parameters():
        plain = name.replace("modules_to_save.default.", "")
        wanted = any(pattern.search(plain) for pattern in patterns) and ".original_module." not in name
        is_lora = "lora" in train and ".lora_" in name
        parameter.requires_grad_((wanted and not unused.search(plain)) or is_lora)
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    for entry in train:
        names = (name for name, parameter in trained.named_parameters() if parameter.requires_grad)
        if entry != "lora" and not any(
            PATTERNS[entry].search(n.replace("modules_to_save.default.", "")) for n in names
        ):
            raise RecipeError(f"train names {entry}, but this model has no such parameters: leave it out.")
    return trained


def trains_vision(train: Sequence[str]) -> bool:
    """Whether something is trained that only images reach."""
    return any(name in VISION_PARTS for name in train)


def _unused_layers(model: DeltaLlavaForConditionalGeneration) -> re.Pattern[str]:
    """Names of the tower's parameters that no visual token depends on."""
    config = model.config
    layers = config.vision_config.num_hidden_layers
    levels = (config.vision_feature_layer, *config.vision_feature_levels)
    deepest = max(level % (layers + 1) for level in levels)
    above = "|".join(str(index) for index in range(deepest, layers)) or "none"
    return re.compile(rf"vision_tower\.(.*\.)?(layers\.({above})\.|post_layernorm\.|head\.)")


def _add_lora(model: DeltaLlavaForConditionalGeneration, train: Sequence[str], lora: dict[str, Any]) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("train: lora needs PEFT: pip install 'transformers-delta-llava[train]'.") from error
    linear = {
        name.rpartition(".")[2]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    settings = {**LORA_DEFAULTS, "target_modules": rf".*\.language_model\..*\.({'|'.join(sorted(linear))})", **lora}
    whole = sorted({VISION_PARTS[name] for name in train if name in VISION_PARTS})
    if whole:
        settings.setdefault("modules_to_save", whole)
    try:
        return get_peft_model(model, LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"lora: {' '.join(str(error).split())}") from error
