"""The kinds of trained checkpoints: full, projector only, LoRA run. Each becomes one set of tensors by full names."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from ..utils.files import read_json
from ..utils.hub import local_folder, public_name
from .checkpoint_reader import Checkpoint, LazyTensor, has_weights, open_weights, read_checkpoint
from .errors import ConversionError, listed
from .key_map import SOURCE_PROJECTOR
from .language_models import LANGUAGE_MODELS
from .lora import ADAPTER_CONFIG, PEFT_PREFIX, merge_lora, read_lora_settings
from .tokenizer import TOKENIZER_FILES


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
        ConversionError: no weights, a partial checkpoint without its base, a base of another family, or files that cannot
            be read or do not fit each other.
    """
    adapter = _first(folder, _ADAPTER)
    projector = _first(folder, _PROJECTOR_FILES)
    if adapter is None and (folder / ADAPTER_CONFIG).is_file():
        raise ConversionError(f"{folder.name} has {ADAPTER_CONFIG}, but neither {' nor '.join(_ADAPTER)}.")
    if adapter is None and (has_weights(folder) or projector is None):
        if base_model is not None:
            raise ConversionError(f"{folder.name} is a full checkpoint, which needs no --base-model; leave it out.")
        return SourceTensors(read_checkpoint(folder))
    kind = "the projector only" if adapter is None else "a LoRA adapter"
    if base_model is None:
        raise ConversionError(f"{folder.name} holds {kind}; pass the model that it was trained on with --base-model.")
    base = _read_base(base_model, text_config.model_type)
    if adapter is not None:
        return _lora(folder, adapter, base, bool(text_config.tie_word_embeddings))
    assert projector is not None
    trained = _plain_names(open_weights(projector), projector)
    strange = [name for name in trained if not name.startswith(SOURCE_PROJECTOR)]
    if strange:
        raise ConversionError(f"{projector.name} holds more than a projector: {listed(strange)}.")
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
            raise ConversionError(f"{adapter.name} and {beside.name} both hold {listed(twice)}.")
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
        raise ConversionError(f"{file.name} holds tensors twice, with and without {PEFT_PREFIX!r} before their names.")
    return plain


def _read_base(spec: str, text_model_type: str) -> BaseModel:
    folder = local_folder(spec, "base model", (*_BASE_FILES, "model*.safetensors*"), "--base-model")
    if not has_weights(folder) and not Path(spec).is_dir():
        folder = local_folder(spec, "base model", (*_BASE_FILES, "pytorch_model*.bin*"))
    if (folder / "config.json").is_file():
        found = read_json(folder / "config.json").get("model_type")
        family = LANGUAGE_MODELS.get(found) if isinstance(found, str) else None
        if (family.text_model_type if family else found) != text_model_type:
            raise ConversionError(
                f"The base model {public_name(spec)} has model_type={found!r}, but the checkpoint was trained on a "
                f"{text_model_type}; give the right one (--base-model)."
            )
    return BaseModel(public_name(spec), folder, read_checkpoint(folder))


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files; ConversionError where something else has its name, which is easily taken for nothing."""
    for path in (folder / name for name in names):
        if path.is_file():
            return path
        if os.path.lexists(path):
            raise ConversionError(f"{path.name} in {folder.name} is not a regular file.")
    return None
