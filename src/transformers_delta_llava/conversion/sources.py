"""What a checkpoint's folder holds: a full model, a projector beside its base model, or a LoRA run.

PEFT holds the factors in float32 and adds `(B @ A) * scaling` in place to a weight of whatever dtype, but of an embedding
it first rounds that update to the embedding's dtype; so does this.
"""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import regex
import torch
from pydantic import Field
from transformers import PreTrainedConfig

from ..hub.tokenizer import TOKENIZER_FILES
from ..utils.errors import DeltaLlavaError, format_names
from ..utils.files import local_folder, public_name, read_json
from ..utils.validation import FileModel, validate
from .checkpoint import Checkpoint, LazyTensor, has_weights, open_weights, read_checkpoint, same_bits
from .language_models import LANGUAGE_MODELS
from .weight_mapping import SOURCE_PROJECTOR


ADAPTER_CONFIG = "adapter_config.json"
# What PEFT puts before the names of the model that it wraps.
PEFT_PREFIX = "base_model.model."
_FACTOR = regex.compile(r"(.+)\.lora_(embedding_)?(A|B)(?:\.default)?(?:\.weight)?")
# Keys that have no effect on what a trained adapter adds. Any other that is set asks for more than W + B A.
_NO_EFFECT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
        *(
            "exclude_modules",
            "inference_mode",
            "layers_pattern",
            "layers_to_transform",
            "loftq_config",
            "lora_dropout",
        ),
        *(
            "lora_ga_config",
            "megatron_config",
            "megatron_core",
            "modules_to_save",
            "peft_version",
            "qalora_group_size",
        ),
        *("r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type"),
    )
)
# Ways to begin that leave the base weights as they are; the others put the adapter on weights of their own.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Seconds that the patterns of one adapter may take in all: a stranger's may backtrack for ever.
_PATTERN_SECONDS = 5.0
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NOT_OF_THE_BASE = (SOURCE_PROJECTOR, "model.vision_tower.")


class LoraSettings(FileModel):
    """What scales an adapter: `lora_alpha` by module, the default first, and whether the rank counts by its root."""

    peft_type: str | None = "LORA"
    alpha: float = Field(alias="lora_alpha")
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    init_lora_weights: bool | str | None = None

    def scalings(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """The factor of `B @ A` of every module, from its rank.

        Raises:
            DeltaLlavaError: a pattern that is not one, or that takes too long.
        """
        deadline = time.monotonic() + _PATTERN_SECONDS
        patterns = [(_compile(pattern), alpha) for pattern, alpha in (self.alpha_pattern or {}).items()]
        scalings = {}
        for module, rank in ranks.items():
            alpha = next((a for pattern, a in patterns if _matches(pattern, module, deadline)), self.alpha)
            scalings[module] = alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return scalings


def _compile(pattern: str) -> Any:
    try:
        return regex.compile(rf"(.*\.)?({pattern})$")
    except (regex.error, RecursionError, OverflowError):
        raise DeltaLlavaError(f"{ADAPTER_CONFIG}: {pattern!r} in alpha_pattern is not a valid pattern.") from None


def _matches(pattern: Any, module: str, deadline: float) -> bool:
    try:
        return pattern.match(module, timeout=max(deadline - time.monotonic(), 0.01)) is not None
    except TimeoutError:
        raise DeltaLlavaError(
            f"{ADAPTER_CONFIG}: the patterns in alpha_pattern take more than {_PATTERN_SECONDS:.0f} seconds to match."
        ) from None


def read_lora_settings(folder: Path) -> LoraSettings:
    """What `adapter_config.json` says.

    Raises:
        DeltaLlavaError: the file is missing, is not LoRA's, asks for a variant that is not a low-rank sum, or for one
            that sits on other weights than the base model's.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise DeltaLlavaError(f"{folder.name} holds an adapter without its {ADAPTER_CONFIG}.")
    values = read_json(path)
    settings = validate(LoraSettings, values, ADAPTER_CONFIG)
    if settings.peft_type not in (None, "LORA"):
        raise DeltaLlavaError(f"{ADAPTER_CONFIG} has peft_type={settings.peft_type!r}; only LORA can be merged.")
    used = {field.alias or name for name, field in LoraSettings.model_fields.items()}
    variants = [f"{name}={value!r}" for name, value in values.items() if value and name not in used | _NO_EFFECT]
    if variants:
        raise DeltaLlavaError(
            f"{ADAPTER_CONFIG} asks for {format_names(variants)}, which is more than a low-rank sum; merge it with PEFT "
            "(merge_and_unload) and convert the full checkpoint."
        )
    if settings.init_lora_weights not in _PLAIN_STARTS:
        raise DeltaLlavaError(
            f"{ADAPTER_CONFIG} has init_lora_weights={settings.init_lora_weights!r}, so the adapter belongs on base "
            "weights that this initialisation has changed, not on the base model's; merge it with PEFT "
            "(merge_and_unload) and convert the full checkpoint, or save it with path_initial_model_for_weight_conversion."
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
            raise DeltaLlavaError(f"The adapter's {name} is not understood; merge it with PEFT (merge_and_unload).")
        elif ".original_module." not in name:  # what `modules_to_save` replaces
            _add_whole(whole, name, tensor)
    unexpected = [n for n in whole.keys() - base.keys() if n != HEAD and not n.startswith(_NOT_OF_THE_BASE)]
    if unexpected:
        raise DeltaLlavaError(
            f"The adapter holds tensors that the base model does not have: {format_names(unexpected)}."
        )
    merged = {**base, **whole}
    if tied:
        changed = [f"{module}.weight" for module, _ in factors if f"{module}.weight" in (EMBEDDINGS, HEAD)]
        if changed:
            raise DeltaLlavaError(
                f"The adapter has factors for {format_names(changed)}, but the model ties its head to its embeddings "
                "(tie_word_embeddings): PEFT trains with one of them and merges into both, so there is no right result; "
                "train the whole of them instead (modules_to_save), or untie the model."
            )
        if EMBEDDINGS in base and (HEAD in whole or EMBEDDINGS in whole):
            merged.setdefault(HEAD, base[EMBEDDINGS])
            tied = same_bits(merged[EMBEDDINGS].load(), merged[HEAD].load())
    ranks = {module: pair["A"].shape[0] for (module, _), pair in factors.items() if "A" in pair and pair["A"].shape}
    scalings = settings.scalings(ranks)
    for (module, embedding), pair in factors.items():
        weight = merged.get(f"{module}.weight")
        if weight is None or pair.keys() != {"A", "B"}:
            what = "no such weight in the base model" if weight is None else "only one of its two factors"
            raise DeltaLlavaError(f"The adapter cannot be merged into {module}: there is {what}.")
        transposed = embedding or bool(settings.fan_in_fan_out)
        merged[f"{module}.weight"] = _sum(
            module, weight, pair["A"], pair["B"], scalings.get(module, 0.0), transposed, embedding
        )
    return merged, tied


def _add_whole(whole: dict[str, LazyTensor], name: str, tensor: LazyTensor) -> None:
    """Add a whole tensor under the base's name; PEFT saves embeddings and heads under several at once."""
    for level in (".modules_to_save.default.", ".modules_to_save.", ".base_layer."):
        name = name.replace(level, ".")
    other = whole.setdefault(name, tensor)
    if other is not tensor and not same_bits(other.load(), tensor.load()):
        raise DeltaLlavaError(f"The adapter holds two different {name}.")


def _sum(
    module: str,
    weight: LazyTensor,
    a: LazyTensor,
    b: LazyTensor,
    scaling: float,
    transposed: bool,
    embedding: bool,
) -> LazyTensor:
    outer = (b.shape[0], a.shape[1]) if len(a.shape) == len(b.shape) == 2 else None
    if outer is None or a.shape[0] != b.shape[1] or weight.shape != (outer[::-1] if transposed else outer):
        raise DeltaLlavaError(
            f"The adapter's factors {a.shape} and {b.shape} of {module} do not fit its weight {weight.shape}; is this the "
            "base model that it was trained on?"
        )
    rounded = weight.dtype if embedding else torch.float32
    return replace(weight, load=partial(_add, weight, a, b, scaling, transposed, rounded))


def _add(
    weight: LazyTensor, a: LazyTensor, b: LazyTensor, scaling: float, transposed: bool, rounded: torch.dtype
) -> torch.Tensor:
    update = b.load().float() @ a.load().float()
    total = weight.load().clone()
    total += ((update.T if transposed else update) * scaling).to(rounded)
    return total


_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_NON_LORA = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
PROJECTOR_FILE = "mm_projector.bin"
_PROJECTOR_FILES = ("mm_projector.safetensors", PROJECTOR_FILE, "mm_projector.pt")
_BASE_FILES = ("config.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class SourceTensors:
    """What a source holds.

    Attributes:
        checkpoint: all tensors, and the files of the source alone.
        base: the base model that completes it, if any.
        untied: whether it has a head of its own although its config ties it to the embeddings.
    """

    checkpoint: Checkpoint
    base: "BaseModel | None" = None
    untied: bool = False


@dataclass(frozen=True)
class BaseModel:
    """The language model (or full checkpoint) that a partial one was trained on. `name` may be published."""

    name: str
    folder: Path
    checkpoint: Checkpoint


def read_source(folder: Path, base_model: str | None, text_config: PreTrainedConfig) -> SourceTensors:
    """Open a checkpoint of any kind; values stay on disk.

    Args:
        folder: with weights of a full checkpoint, or `mm_projector.bin`, or `adapter_model.*`.
        base_model: folder or Hub id of what a partial checkpoint was trained on.
        text_config: the language model that the source's config describes.

    Raises:
        DeltaLlavaError: no weights, a partial checkpoint without its base, a base of another family, or files that cannot
            be read or do not fit each other.
    """
    adapter = _first(folder, _ADAPTER)
    projector = _first(folder, _PROJECTOR_FILES)
    if adapter is None and (folder / ADAPTER_CONFIG).is_file():
        raise DeltaLlavaError(f"{folder.name} has {ADAPTER_CONFIG}, but neither {' nor '.join(_ADAPTER)}.")
    if adapter is None and (has_weights(folder) or projector is None):
        if base_model is not None:
            raise DeltaLlavaError(f"{folder.name} is a full checkpoint, which needs no --base-model; leave it out.")
        return SourceTensors(read_checkpoint(folder))
    kind = "the projector only" if adapter is None else "a LoRA adapter"
    if base_model is None:
        raise DeltaLlavaError(f"{folder.name} holds {kind}; pass the model that it was trained on with --base-model.")
    base = _read_base(base_model, text_config.model_type)
    if adapter is not None:
        return _lora(folder, adapter, base, bool(text_config.tie_word_embeddings))
    assert projector is not None
    trained = _plain_names(open_weights(projector), projector)
    strange = [name for name in trained if not name.startswith(SOURCE_PROJECTOR)]
    if strange:
        raise DeltaLlavaError(f"{projector.name} holds more than a projector: {format_names(strange)}.")
    # All of the projector comes from one file: a base that has one, too, gives none of it.
    kept = {n: tensor for n, tensor in base.checkpoint.tensors.items() if not n.startswith(SOURCE_PROJECTOR)}
    return SourceTensors(Checkpoint({**kept, **trained}, (projector,)), base)


def open_trained(folder: Path) -> Checkpoint | None:
    """What a folder brings without a base model: its full checkpoint or its projector; None where it has neither."""
    if has_weights(folder):
        return read_checkpoint(folder)
    projector = _first(folder, _PROJECTOR_FILES)
    return Checkpoint(_plain_names(open_weights(projector), projector), (projector,)) if projector else None


def _lora(folder: Path, adapter: Path, base: BaseModel, tied: bool) -> SourceTensors:
    files, tensors = [adapter], dict(base.checkpoint.tensors)
    beside = _first(folder, _NON_LORA)
    updates = _plain_names(open_weights(adapter), adapter)
    if beside is not None:
        trained = _plain_names(open_weights(beside), beside)
        if twice := trained.keys() & updates.keys():
            raise DeltaLlavaError(f"{adapter.name} and {beside.name} both hold {format_names(twice)}.")
        if any(name.startswith(SOURCE_PROJECTOR) for name in trained):
            tensors = {n: tensor for n, tensor in tensors.items() if not n.startswith(SOURCE_PROJECTOR)}
        tensors |= trained
        files.append(beside)
    merged, still_tied = merge_lora(tensors, updates, read_lora_settings(folder), tied)
    return SourceTensors(Checkpoint(merged, (*files, folder / ADAPTER_CONFIG)), base, untied=tied and not still_tied)


def _plain_names(tensors: Mapping[str, LazyTensor], file: Path) -> dict[str, LazyTensor]:
    """`tensors` without PEFT's prefix in their names."""
    plain = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    if len(plain) != len(tensors):
        raise DeltaLlavaError(f"{file.name} holds tensors twice, with and without {PEFT_PREFIX!r} before their names.")
    return plain


def _read_base(spec: str, text_model_type: str) -> BaseModel:
    folder = local_folder(spec, "base model", (*_BASE_FILES, "model*.safetensors*"), "base_model")
    if not has_weights(folder) and not Path(spec).is_dir():
        folder = local_folder(spec, "base model", (*_BASE_FILES, "pytorch_model*.bin*"))
    if (folder / "config.json").is_file():
        found = read_json(folder / "config.json").get("model_type")
        family = LANGUAGE_MODELS.get(found) if isinstance(found, str) else None
        if (family.text_model_type if family else found) != text_model_type:
            raise DeltaLlavaError(
                f"The base model {public_name(spec)} has model_type={found!r}, but the checkpoint was trained on a "
                f"{text_model_type}; give the right one (--base-model)."
            )
    return BaseModel(public_name(spec), folder, read_checkpoint(folder))


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files; DeltaLlavaError where something else has its name, which is easily taken for nothing."""
    for path in (folder / name for name in names):
        if path.is_file():
            return path
        if os.path.lexists(path):
            raise DeltaLlavaError(f"{path.name} in {folder.name} is not a regular file.")
    return None
