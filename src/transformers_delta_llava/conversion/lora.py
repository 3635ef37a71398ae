"""A LoRA run on top of its base model: what PEFT's `merge_and_unload` computes, one matrix at a time.

PEFT holds the factors in float32 and adds `(B @ A) * scaling` in place to a weight of whatever dtype, but of an embedding
it first rounds that update to the embedding's dtype; so does this.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..utils.files import read_json
from .checkpoint_reader import LazyTensor
from .errors import ConversionError, listed


ADAPTER_CONFIG = "adapter_config.json"
# What PEFT puts before the names of the model that it wraps.
PEFT_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?(A|B)(?:\.default)?(?:\.weight)?")
# Variants that compute something other than W + B A.
_REFUSED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
)


@dataclass(frozen=True)
class LoraSettings:
    """What scales an adapter: `lora_alpha` by module, the default first, and whether the rank counts by its root."""

    alpha: float
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    transposed: bool

    def scaling(self, module: str, rank: int) -> float:
        """The factor of `B @ A` for `module`."""
        patterns = self.alpha_pattern.items()
        alpha = next((a for pattern, a in patterns if _matches(pattern, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_lora_settings(folder: Path) -> LoraSettings:
    """What `adapter_config.json` says.

    Raises:
        ConversionError: the file is missing, is not LoRA's, or asks for a variant that is not a low-rank sum.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ConversionError(f"{folder.name} holds an adapter without its {ADAPTER_CONFIG}.")
    config = read_json(path)
    if config.get("peft_type", "LORA") != "LORA":
        raise ConversionError(f"{ADAPTER_CONFIG} has peft_type={config['peft_type']!r}; only LORA can be merged.")
    variants = [f"{name}={config[name]!r}" for name in _REFUSED if config.get(name)]
    if variants:
        raise ConversionError(
            f"{ADAPTER_CONFIG} asks for {listed(variants)}, which is more than a low-rank sum; merge it with PEFT "
            "(merge_and_unload) and convert the full checkpoint."
        )
    alpha: Any = config.get("lora_alpha")
    pattern: Any = config.get("alpha_pattern") or {}
    numbers: list[Any] = [alpha, *pattern.values()] if isinstance(pattern, dict) else [None]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ConversionError(
            f"{ADAPTER_CONFIG} has lora_alpha={alpha!r}, alpha_pattern={pattern!r}; numbers are due."
        )
    return LoraSettings(alpha, pattern, bool(config.get("use_rslora")), bool(config.get("fan_in_fan_out")))


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        raise ConversionError(f"{ADAPTER_CONFIG} has the alpha_pattern {pattern!r}, which is no pattern.") from None


def merge_lora(
    base: Mapping[str, LazyTensor], adapter: Mapping[str, LazyTensor], settings: LoraSettings
) -> dict[str, LazyTensor]:
    """`base` with an adapter's updates added, each when it is read; other tensors of the adapter replace the base's.

    Args:
        base: the base model's tensors, by name.
        adapter: the adapter's, by the base's names (without PEFT's prefix): `X.lora_A.weight` (r, in),
            `X.lora_B.weight` (out, r), and whole tensors that were trained beside it.
        settings: see `read_lora_settings`.

    Raises:
        ConversionError: a factor without its partner or its weight, or shapes that do not fit each other.
    """
    merged = dict(base)
    factors: dict[tuple[str, bool], dict[str, LazyTensor]] = {}
    for name, tensor in adapter.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            if ".lora_" in name:
                raise ConversionError(
                    f"The adapter's {name} is not understood; merge it with PEFT (merge_and_unload)."
                )
            merged[name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")] = tensor
        else:
            factors.setdefault((match[1], bool(match[2])), {})[match[3]] = tensor
    for (module, embedding), pair in factors.items():
        weight = merged.get(f"{module}.weight")
        if weight is None or pair.keys() != {"A", "B"}:
            what = "no such weight in the base model" if weight is None else "only one of its two factors"
            raise ConversionError(f"The adapter cannot be merged into {module}: there is {what}.")
        merged[f"{module}.weight"] = _sum(module, weight, pair["A"], pair["B"], settings, embedding)
    return merged


def _sum(
    module: str, weight: LazyTensor, a: LazyTensor, b: LazyTensor, settings: LoraSettings, embedding: bool
) -> LazyTensor:
    transposed = embedding or settings.transposed
    outer = (b.shape[0], a.shape[1]) if len(a.shape) == len(b.shape) == 2 else None
    if outer is None or a.shape[0] != b.shape[1] or weight.shape != (outer[::-1] if transposed else outer):
        raise ConversionError(
            f"The adapter's factors {a.shape} and {b.shape} of {module} do not fit its weight {weight.shape}; is this the "
            "base model that it was trained on?"
        )
    scaling = settings.scaling(module, a.shape[0])
    rounded = weight.dtype if embedding else torch.float32
    return replace(weight, load=partial(_add, weight, a, b, scaling, transposed, rounded))


def _add(
    weight: LazyTensor, a: LazyTensor, b: LazyTensor, scaling: float, transposed: bool, rounded: torch.dtype
) -> torch.Tensor:
    update = b.load().float() @ a.load().float()
    total = weight.load().clone()
    total += ((update.T if transposed else update) * scaling).to(rounded)
    return total
