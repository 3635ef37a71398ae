"""Everything that a conversion reads: a full checkpoint, a projector or a LoRA run, with what it needs from elsewhere."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..hub.repo_files import TOKENIZER_FILES
from ..utils.errors import DeltaLlavaError, explain_errors, format_names, show
from ..utils.files import hub_id_of, local_folder, public_name, read_json
from .config import SourceConfig, read_config
from .lora import ADAPTER_CONFIG, merge_lora, read_lora_settings
from .names import (
    SOURCE_EMBEDDINGS,
    SOURCE_PROJECTOR,
    check_projector,
    map_names,
    tower_part,
)
from .prompts import LANGUAGE_MODELS, ChatTemplate, choose_chat_template
from .tokenizer import TokenIds, add_tokens, has_tokenizer, load_tokenizer, read_own_template
from .vision_tower import VisionTower, adapt_to_weights, find_vision_tower, load_vision_tower
from .weights import Checkpoint, LazyTensor, has_weights, open_weights, read_checkpoint


PROJECTOR_FILE = "mm_projector.bin"
_PROJECTOR_FILES = ("mm_projector.safetensors", PROJECTOR_FILE, "mm_projector.pt")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_BASE_FILES = ("config.json", *TOKENIZER_FILES)
# PEFT puts this before the names of the model that it wraps.
_PEFT_PREFIX = "base_model.model."
# Tokens of a tokenizer that were not trained, beside those that conversion adds: some authors add a few and never resize.
_MOST_NEW_ROWS = 1024


@dataclass(frozen=True)
class BaseModel:
    """The language model (or full checkpoint) that a partial checkpoint was trained on. `name` may be published."""

    name: str
    folder: Path
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Source:
    """A source with all its parts open: settings are read, the values of the tensors stay on disk.

    Attributes:
        folder: of the checkpoint.
        config: its `config.json`.
        checkpoint: all tensors by the authors' names, the base model's included, and the weight files of `folder`.
        base: the model that a projector or a LoRA run was trained on.
        untied: whether a LoRA run gives the model a head of its own although its config ties it to the embeddings.
        tower: the vision tower.
        tokenizer: with the tokens of `token_ids` added.
        chat_template: what the checkpoint was tuned with.
    """

    folder: Path
    config: SourceConfig
    checkpoint: Checkpoint
    base: BaseModel | None
    untied: bool
    tower: VisionTower
    tokenizer: PreTrainedTokenizerBase
    token_ids: TokenIds
    chat_template: ChatTemplate

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings that were trained."""
        return self.checkpoint.tensors[SOURCE_EMBEDDINGS].shape[0]

    @property
    def base_models(self) -> list[str]:
        """Hub ids of the language model and the vision tower, as far as the checkpoint states them."""
        language_model = self.base.name if self.base else self.config.settings.get("_name_or_path")
        ids = [hub_id_of(name, self.folder, self.folder.parent) for name in (language_model, self.tower.name)]
        return [name for name in ids if name is not None]

    @property
    def files(self) -> list[Path]:
        """Files of `folder` that a conversion reads."""
        others = ("config.json", "generation_config.json", *TOKENIZER_FILES)
        return [*self.checkpoint.files, *(self.folder / name for name in others if (self.folder / name).is_file())]

    @property
    def weight_files(self) -> list[Path]:
        """Weight files of the checkpoint, the vision tower and the base model."""
        parts = (self.checkpoint, self.tower.checkpoint, self.base.checkpoint if self.base else None)
        return [file for part in parts if part for file in part.files]


def read_source_config(folder: Path) -> SourceConfig:
    """Read `config.json` of a checkpoint.

    Raises:
        DeltaLlavaError: it cannot be used.
    """
    if not (folder / "config.json").is_file():
        raise DeltaLlavaError(f"The source {folder} is not a folder with a config.json.")
    return read_config(read_json(folder / "config.json"))


def read_source(
    folder: Path,
    config: SourceConfig,
    *,
    base_model: str | None = None,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
) -> Source:
    """Find and open everything that a conversion needs; the values of the tensors stay on disk.

    Args:
        folder: of the checkpoint, and `config`, its config.
        base_model, vision_tower, tokenizer, chat_template: see `convert_checkpoint`.

    Raises:
        DeltaLlavaError: a part is missing, cannot be read, or does not fit the others.
    """
    checkpoint, base, untied = _read_tensors(folder, base_model, config)
    if untied:
        config.text_config.tie_word_embeddings = False
    check_projector(checkpoint.tensors, public_name(str(folder)))
    check_embeddings(checkpoint)
    inner = [part for name in map_names(checkpoint.tensors).values() if (part := tower_part(name)) is not None]
    tower_id = vision_tower or find_vision_tower(config.keys.mm_vision_tower, folder, with_weights=not inner)
    tower = load_vision_tower(tower_id, with_weights=not inner)
    adapt_to_weights(tower.config, tower.checkpoint.tensors if tower.checkpoint else inner)

    if tokenizer is None:
        tokenizer = str(base.folder if base is not None and not has_tokenizer(folder) else folder)
    with explain_errors(f"The tokenizer of {public_name(tokenizer)} cannot be used"):
        loaded = load_tokenizer(tokenizer, config.text_config, config.language_model.sentencepiece_class)
        token_ids = add_tokens(loaded)
        own_template = read_own_template(tokenizer)
    rows = checkpoint.tensors[SOURCE_EMBEDDINGS].shape[0]
    if token_ids.count - rows > _MOST_NEW_ROWS:
        raise DeltaLlavaError(
            f"The tokenizer has ids up to {token_ids.count - 1:,}, but the checkpoint was trained with {rows:,} rows: it is "
            "not the tokenizer of this checkpoint; pass the right one as `tokenizer=...`."
        )
    base_name = base.name if base else None
    template = choose_chat_template(chat_template, config.settings, base_name, loaded, own_template, folder)
    return Source(folder, config, checkpoint, base, untied, tower, loaded, token_ids, template)


def open_trained(folder: Path) -> Checkpoint | None:
    """The tensors of a folder without a base model: its full checkpoint or its projector; None where it has neither."""
    if has_weights(folder):
        return read_checkpoint(folder)
    projector = _find_file(folder, _PROJECTOR_FILES)
    return Checkpoint(_open_plain(projector), (projector,)) if projector else None


def check_embeddings(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without a table of embeddings."""
    embeddings = checkpoint.tensors.get(SOURCE_EMBEDDINGS)
    if embeddings is None:
        raise DeltaLlavaError(f"The checkpoint has no language model in it (no {SOURCE_EMBEDDINGS}).")
    if len(embeddings.shape) != 2:
        raise DeltaLlavaError(f"{SOURCE_EMBEDDINGS} should be a matrix with a row for each token.")


def _read_tensors(
    folder: Path, base_model: str | None, config: SourceConfig
) -> tuple[Checkpoint, BaseModel | None, bool]:
    """The tensors of a checkpoint of any kind, its base model, and whether the head is no longer tied to the embeddings."""
    adapter = _find_file(folder, _ADAPTER_FILES)
    projector = _find_file(folder, _PROJECTOR_FILES)
    if adapter is None and (folder / ADAPTER_CONFIG).is_file():
        raise DeltaLlavaError(f"{folder.name} has {ADAPTER_CONFIG}, but neither {' nor '.join(_ADAPTER_FILES)}.")
    if adapter is None and (has_weights(folder) or projector is None):
        if base_model is not None:
            raise DeltaLlavaError(
                f"{folder.name} is a full checkpoint, which needs no base model; do not pass `base_model=...`."
            )
        return read_checkpoint(folder), None, False
    if base_model is None:
        kind = "the projector only" if adapter is None else "a LoRA adapter"
        raise DeltaLlavaError(
            f"{folder.name} holds {kind}; pass the model that it was trained on as `base_model=...`."
        )
    base = _read_base(base_model, config.language_model.text_model_type)
    if adapter is not None:
        return _read_lora(folder, adapter, base, bool(config.text_config.tie_word_embeddings))
    assert projector is not None
    trained = _open_plain(projector)
    if others := [name for name in trained if not name.startswith(SOURCE_PROJECTOR)]:
        raise DeltaLlavaError(f"{projector.name} holds more than a projector: {format_names(others)}.")
    tensors = {**_without_projector(base.checkpoint.tensors), **trained}
    return Checkpoint(tensors, (projector,)), base, False


def _read_lora(folder: Path, adapter: Path, base: BaseModel, tied: bool) -> tuple[Checkpoint, BaseModel, bool]:
    files, tensors = [adapter], dict(base.checkpoint.tensors)
    updates = _open_plain(adapter)
    if (non_lora := _find_file(folder, _NON_LORA_FILES)) is not None:
        trained = _open_plain(non_lora)
        if duplicates := trained.keys() & updates.keys():
            raise DeltaLlavaError(f"{adapter.name} and {non_lora.name} both hold {format_names(duplicates)}.")
        if any(name.startswith(SOURCE_PROJECTOR) for name in trained):
            tensors = _without_projector(tensors)
        tensors |= trained
        files.append(non_lora)
    merged, still_tied = merge_lora(tensors, updates, read_lora_settings(folder), tied)
    return Checkpoint(merged, (*files, folder / ADAPTER_CONFIG)), base, tied and not still_tied


def _without_projector(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` of a base model without its projector: all of the projector comes from the run."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(SOURCE_PROJECTOR)}


def _open_plain(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file without PEFT's prefix in their names."""
    tensors = open_weights(file)
    plain = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    if len(plain) != len(tensors):
        raise DeltaLlavaError(
            f"{file.name} holds tensors twice, with and without {_PEFT_PREFIX!r} before their names."
        )
    return plain


def _read_base(model_id: str, text_model_type: str) -> BaseModel:
    folder = local_folder(model_id, "base model", (*_BASE_FILES, "model*.safetensors*"), "base_model")
    if not has_weights(folder) and not Path(model_id).is_dir():
        folder = local_folder(model_id, "base model", (*_BASE_FILES, "pytorch_model*.bin*"), "base_model")
    if (folder / "config.json").is_file():
        model_type = read_json(folder / "config.json").get("model_type")
        family = LANGUAGE_MODELS.get(model_type) if isinstance(model_type, str) else None
        if (family.text_model_type if family else model_type) != text_model_type:
            raise DeltaLlavaError(
                f"The base model {public_name(model_id)} has model_type={show(model_type)}, but the checkpoint was trained on a "
                f"{text_model_type}; pass the right one as `base_model=...`."
            )
    return BaseModel(public_name(model_id), folder, read_checkpoint(folder))


def _find_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files that exists; DeltaLlavaError where the name belongs to a folder or a broken link."""
    for path in (folder / name for name in names):
        if path.is_file():
            return path
        if os.path.lexists(path):
            raise DeltaLlavaError(f"{path.name} in {folder.name} is not a regular file.")
    return None
