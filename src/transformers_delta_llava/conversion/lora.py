"""Merges a LoRA adapter into the weights that it was trained on, to the bits of PEFT's `merge_and_unload`.

PEFT holds the factors in float32 and adds `(B @ A) * scaling` in place to a weight of whatever dtype, but the update of an
embedding it first rounds to the embedding's dtype; so does this.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex
import torch
from pydantic import Field

from ..utils.errors import DeltaLlavaError, format_names, show
from ..utils.files import read_json
from ..utils.validation import FileModel, validate
from .names import HEAD, SOURCE_EMBEDDINGS, SOURCE_PROJECTOR, TOWER
from .weights import LazyTensor, same_bits


ADAPTER_CONFIG = "adapter_config.json"
_FACTOR = regex.compile(r"(.+)\.lora_(embedding_)?(A|B)(?:\.default)?(?:\.weight)?")
# Keys that do not change what a trained adapter adds. Any other key with a value asks for more than W + B A.
_NO_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    ]
)
# Initialisations that leave the base weights unchanged; with the others the adapter belongs to changed weights.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
# Seconds that the patterns of one adapter may take in all: a regular expression from a file may backtrack for ever.
_PATTERN_SECONDS = 5.0
_MERGE_WITH_PEFT = "merge it with PEFT (merge_and_unload)"


class LoraSettings(FileModel):
    """The part of `adapter_config.json` that scales an adapter."""

    peft_type: str | None = "LORA"
    alpha: float = Field(alias="lora_alpha")
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    init_lora_weights: bool | str | None = None

    def scalings(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """The factor of `B @ A` of every module, from its rank.

        Raises:
            DeltaLlavaError: a pattern that is invalid or takes too long.
        """
        deadline = time.monotonic() + _PATTERN_SECONDS
        patterns = [(_compile(pattern), alpha) for pattern, alpha in (self.alpha_pattern or {}).items()]
        scalings = {}
        for module, rank in ranks.items():
            alpha = next((alpha for pattern, alpha in patterns if _matches(pattern, module, deadline)), self.alpha)
            scalings[module] = alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return scalings


def _compile(pattern: str) -> Any:
    try:
        return regex.compile(rf"(.*\.)?({pattern})$")
    except (regex.error, RecursionError, OverflowError):
        raise DeltaLlavaError(f"{ADAPTER_CONFIG}: {show(pattern)} in alpha_pattern is not a valid pattern.") from None


def _matches(pattern: Any, module: str, deadline: float) -> bool:
    try:
        return pattern.match(module, timeout=max(deadline - time.monotonic(), 0.01)) is not None
    except TimeoutError:
        raise DeltaLlavaError(
            f"{ADAPTER_CONFIG}: the patterns in alpha_pattern take more than {_PATTERN_SECONDS:.0f} seconds to match."
        ) from None


def read_lora_settings(folder: Path) -> LoraSettings:
    """Read `adapter_config.json`.

    Raises:
        DeltaLlavaError: the file is missing or not LoRA's, asks for a variant that is not a low-rank sum, or for one whose
            initialisation changes the base model's weights.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise DeltaLlavaError(f"{folder.name} holds an adapter without its {ADAPTER_CONFIG}.")
    values = read_json(path)
    settings = validate(LoraSettings, values, ADAPTER_CONFIG)
    if settings.peft_type not in (None, "LORA"):
        raise DeltaLlavaError(f"{ADAPTER_CONFIG} has peft_type={show(settings.peft_type)}; only LORA can be merged.")
    used = {field.alias or name for name, field in LoraSettings.model_fields.items()}
    variants = [f"{name}={show(value)}" for name, value in values.items() if value and name not in used | _NO_EFFECT]
    if variants:
        raise DeltaLlavaError(
            f"{ADAPTER_CONFIG} asks for {format_names(variants)}, which is more than a low-rank sum; {_MERGE_WITH_PEFT} "
            "and convert the full checkpoint."
        )
    if settings.init_lora_weights not in _PLAIN_INITIALISATIONS:
        raise DeltaLlavaError(
            f"{ADAPTER_CONFIG} has init_lora_weights={show(settings.init_lora_weights)}, which changes the base weights, so the "
            f"adapter does not fit the base model's own; {_MERGE_WITH_PEFT} and convert the full checkpoint, or save the "
            "adapter with path_initial_model_for_weight_conversion."
        )
    return settings


def merge_lora(
    base: Mapping[str, LazyTensor], adapter: Mapping[str, LazyTensor], settings: LoraSettings, tied: bool = False
) -> tuple[dict[str, LazyTensor], bool]:
    """`base` with an adapter's updates added, each when it is read; other tensors of the adapter replace the base's.

    Args:
        base: the base model's tensors, by name.
        adapter: the adapter's, by the base's names (without PEFT's prefix): `X.lora_A.weight` (r, in),
            `X.lora_B.weight` (out, r), and whole tensors that were trained or saved beside it.
        settings: see `read_lora_settings`.
        tied: whether the base's head is its embeddings.

    Returns:
        The tensors, and whether the head is still tied: PEFT trains a copy of only one of the two where
        `modules_to_save` names only one.

    Raises:
        DeltaLlavaError: a factor without its partner or its weight, shapes that do not fit each other, tensors that are
            neither factors nor the base's, or factors for one of two tied weights.
    """
    factors: dict[tuple[str, bool], dict[str, LazyTensor]] = {}
    whole: dict[str, LazyTensor] = {}
    for name, tensor in adapter.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault((match[1], bool(match[2])), {})[match[3]] = tensor
        elif ".lora_" in name:
            raise DeltaLlavaError(f"The adapter's {name} is of an unknown kind; {_MERGE_WITH_PEFT}.")
        elif ".original_module." not in name:  # what `modules_to_save` replaces
            _add_whole(whole, name, tensor)
    unexpected = [n for n in whole.keys() - base.keys() if n != HEAD and not n.startswith((SOURCE_PROJECTOR, TOWER))]
    if unexpected:
        raise DeltaLlavaError(
            f"The adapter holds tensors that the base model does not have: {format_names(unexpected)}."
        )
    merged = {**base, **whole}
    if tied:
        changed = [f"{module}.weight" for module, _ in factors if f"{module}.weight" in (SOURCE_EMBEDDINGS, HEAD)]
        if changed:
            raise DeltaLlavaError(
                f"The adapter has factors for {format_names(changed)}, but the model ties its head to its embeddings "
                "(tie_word_embeddings): PEFT trains with one of them and merges into both, so there is no right result; "
                "train the whole of them instead (modules_to_save), or untie the model."
            )
        if SOURCE_EMBEDDINGS in base and whole.keys() & {HEAD, SOURCE_EMBEDDINGS}:
            merged.setdefault(HEAD, base[SOURCE_EMBEDDINGS])
            tied = same_bits(merged[SOURCE_EMBEDDINGS].load(), merged[HEAD].load())
    ranks = {module: pair["A"].shape[0] for (module, _), pair in factors.items() if "A" in pair and pair["A"].shape}
    scalings = settings.scalings(ranks)
    for (module, is_embedding), pair in factors.items():
        weight = merged.get(f"{module}.weight")
        if weight is None or pair.keys() != {"A", "B"}:
            reason = "no such weight in the base model" if weight is None else "only one of its two factors"
            raise DeltaLlavaError(f"The adapter cannot be merged into {module}: there is {reason}.")
        transposed = is_embedding or bool(settings.fan_in_fan_out)
        _check_factors(module, weight, pair, transposed)
        merged[f"{module}.weight"] = _merge_pair(weight, pair, scalings.get(module, 0.0), transposed, is_embedding)
    return merged, tied


def _add_whole(whole: dict[str, LazyTensor], name: str, tensor: LazyTensor) -> None:
    """Add a whole tensor under the base's name; PEFT saves embeddings and heads under several names at once."""
    for level in (".modules_to_save.default.", ".modules_to_save.", ".base_layer."):
        name = name.replace(level, ".")
    other = whole.setdefault(name, tensor)
    if other is not tensor and not same_bits(other.load(), tensor.load()):
        raise DeltaLlavaError(f"The adapter holds two different {name}.")


def _check_factors(module: str, weight: LazyTensor, pair: Mapping[str, LazyTensor], transposed: bool) -> None:
    a, b = pair["A"].shape, pair["B"].shape
    shape = (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] else None
    if shape is None or weight.shape != (shape[::-1] if transposed else shape):
        raise DeltaLlavaError(
            f"The adapter's factors {a} and {b} of {module} do not fit its weight {weight.shape}; is this the base model "
            "that it was trained on?"
        )


def _merge_pair(
    weight: LazyTensor, pair: Mapping[str, LazyTensor], scaling: float, transposed: bool, is_embedding: bool
) -> LazyTensor:
    def merge(value: torch.Tensor) -> torch.Tensor:
        update = pair["B"].load().float() @ pair["A"].load().float()
        total = value.clone()
        total += ((update.T if transposed else update) * scaling).to(total.dtype if is_embedding else torch.float32)
        return total

    return weight.map(merge)
