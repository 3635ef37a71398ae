"""What a conversion reads: a full checkpoint, a projector only or a LoRA run, with the vision tower and the base model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import DeltaLlavaError, format_names, read_json, read_optional_json
from ..hub import TOKENIZER_FILES, is_repo_id, public_name
from ..loading import local_folder
from .config import (
    KNOWN_TOWERS,
    SourceConfig,
    adapt_to_weights,
    build_config,
    image_processor_settings,
    read_config,
    read_tower_config,
)
from .names import HEAD, SOURCE_EMBEDDINGS, SOURCE_PROJECTOR, check_projector, map_names, tower_part
from .prompts import LANGUAGE_MODELS, ChatTemplate, choose_chat_template
from .tokenizer import TokenIds, add_tokens, has_tokenizer, load_tokenizer, read_own_template
from .weights import Checkpoint, LazyTensor, has_weights, open_weights, read_checkpoint, same_bits


PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG = "adapter_config.json"
_PROJECTOR_FILES = ("mm_projector.safetensors", PROJECTOR_FILE, "mm_projector.pt")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
# PEFT puts this before the names of the model that it wraps.
_PEFT_PREFIX = "base_model.model."
# Tokens of a tokenizer that were not trained, in addition to those that conversion adds: some authors add a few and never resize.
_MOST_NEW_ROWS = 1024


@dataclass(frozen=True)
class VisionTower:
    """A tower: its `name` to publish (never a path), geometry, preprocessing, and weights where they were asked for."""

    name: str
    config: PreTrainedConfig
    image_processor: dict[str, Any]
    checkpoint: Checkpoint | None = None


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
        checkpoint: all tensors by the released names, those of the base model included, and the weight files of `folder`.
        base: the model that a projector or a LoRA run was trained on.
        tower: the vision tower.
        tokenizer: with the tokens of `token_ids` added; `tokenizer_folder` has its own files.
        chat_template: what the checkpoint was tuned with.
    """

    folder: Path
    config: SourceConfig
    checkpoint: Checkpoint
    base: BaseModel | None
    tower: VisionTower
    tokenizer: PreTrainedTokenizerBase
    tokenizer_folder: Path
    token_ids: TokenIds
    chat_template: ChatTemplate

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings that were trained."""
        return self.checkpoint.tensors[SOURCE_EMBEDDINGS].shape[0]

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


def open_source(
    folder: Path,
    *,
    base_model: str | None = None,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
) -> Source:
    """Find and open everything that a conversion needs; the values of the tensors stay on disk.

    Args:
        folder: of the checkpoint.
        base_model, vision_tower, tokenizer, chat_template: see `convert_checkpoint`.

    Raises:
        DeltaLlavaError: a part is missing, cannot be read, or does not fit the others.
    """
    config = read_config(read_json(folder / "config.json"))
    checkpoint, base = _open_tensors(folder, base_model, config)
    check_projector(checkpoint.tensors, folder.name)
    if SOURCE_EMBEDDINGS not in checkpoint.tensors:
        raise DeltaLlavaError(f"{folder.name} has no language model in it (no {SOURCE_EMBEDDINGS})")
    inner = [part for name in map_names(checkpoint.tensors).values() if (part := tower_part(name)) is not None]
    named = vision_tower or find_vision_tower(config.settings.get("mm_vision_tower"), folder, with_weights=not inner)
    tower = load_vision_tower(named, with_weights=not inner)
    adapt_to_weights(tower.config, tower.checkpoint.tensors if tower.checkpoint else inner)

    default = base.folder if base and not has_tokenizer(folder) else folder
    with_tokenizer = local_folder(tokenizer, TOKENIZER_FILES) if tokenizer else default
    loaded = load_tokenizer(with_tokenizer, config.text_config, config.language_model.sentencepiece_class)
    rows = checkpoint.tensors[SOURCE_EMBEDDINGS].shape[0]
    token_ids = add_tokens(loaded, rows)
    if token_ids.count - rows > _MOST_NEW_ROWS:
        raise DeltaLlavaError(
            f"the tokenizer has ids up to {token_ids.count - 1:,}, but the checkpoint was trained with {rows:,} rows; pass the "
            "checkpoint's own as tokenizer"
        )
    own, base_name = read_own_template(with_tokenizer), base.name if base else None
    template = choose_chat_template(chat_template, config.settings, base_name, loaded, own, folder)
    return Source(folder, config, checkpoint, base, tower, loaded, with_tokenizer, token_ids, template)


def open_trained(folder: Path) -> Checkpoint:
    """The tensors of a folder without a base model: its full checkpoint, or only its projector."""
    projector = _find_file(folder, _PROJECTOR_FILES)
    if projector is None or has_weights(folder):
        return read_checkpoint(folder)
    return Checkpoint(_open_plain(projector), (projector,))


def _open_tensors(folder: Path, base_model: str | None, config: SourceConfig) -> tuple[Checkpoint, BaseModel | None]:
    """The tensors of a checkpoint of any kind, and its base model."""
    adapter = _find_file(folder, _ADAPTER_FILES)
    projector = _find_file(folder, _PROJECTOR_FILES)
    if adapter is None and (has_weights(folder) or projector is None):
        if base_model is not None:
            raise DeltaLlavaError(f"{folder.name} is a full checkpoint; leave base_model out")
        return read_checkpoint(folder), None
    if base_model is None:
        kind = "only a projector" if adapter is None else "a LoRA adapter"
        raise DeltaLlavaError(f"{folder.name} holds {kind}; pass the model that it was trained on as base_model")
    base = _open_base(base_model, config.language_model.text_model_type)
    extra = _find_file(folder, _NON_LORA_FILES) if adapter else projector
    trained = _open_plain(extra) if extra else {}
    tensors = dict(base.checkpoint.tensors)
    if any(name.startswith(SOURCE_PROJECTOR) for name in trained):  # the run's projector replaces all of the base's
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(SOURCE_PROJECTOR)}
    tensors |= trained
    files = tuple(file for file in (adapter, extra) if file)
    if adapter is None:
        return Checkpoint(tensors, files), base
    settings = read_json(folder / ADAPTER_CONFIG)
    merged = merge_lora(tensors, _open_plain(adapter), settings, tied=config.text_config.tie_word_embeddings)
    return Checkpoint(merged, (*files, folder / ADAPTER_CONFIG)), base


def _open_plain(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file without PEFT's prefix in their names."""
    return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in open_weights(file).items()}


def _open_base(model_id: str, text_model_type: str) -> BaseModel:
    folder = _fetch(model_id, ("config.json", *TOKENIZER_FILES), with_weights=True)
    model_type = read_json(folder / "config.json").get("model_type")
    own_type = LANGUAGE_MODELS[model_type].text_model_type if model_type in LANGUAGE_MODELS else model_type
    if own_type != text_model_type:
        raise DeltaLlavaError(
            f"base_model={public_name(model_id)} has model_type={model_type}, but the checkpoint was trained on a {text_model_type}"
        )
    return BaseModel(public_name(model_id), folder, read_checkpoint(folder))


def _find_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _fetch(model_id: str, files: tuple[str, ...], with_weights: bool) -> Path:
    """The folder `model_id`, or a download of `files` of a Hub repo and of its weights, as safetensors where it has them."""
    folder = local_folder(model_id, (*files, "model*.safetensors*") if with_weights else files)
    if with_weights and not has_weights(folder):
        folder = local_folder(model_id, (*files, "pytorch_model*.bin*"))
    return folder


# Vision towers.


def find_vision_tower(named: str | None, checkpoint: Path, with_weights: bool = False) -> str:
    """Find the tower that a checkpoint names by a Hub id or by a path of the machine that trained it.

    Searched in this order: an absolute path; the path, then its last part, inside the checkpoint's folder and next to it;
    the path from the working directory; a known tower of that last name, whose geometry needs no files.

    Args:
        named: `mm_vision_tower` of the checkpoint's config.
        checkpoint: folder of the checkpoint.
        with_weights: skip folders without weights, such as the one that export writes into a checkpoint.

    Returns:
        A folder or a Hub id.

    Raises:
        DeltaLlavaError: the checkpoint names none, or a path that is not here.
    """
    if not named:
        raise DeltaLlavaError("config.json has no mm_vision_tower; pass the tower's folder or Hub id as vision_tower")
    hub_id = public_name(named)
    path, name = Path(named), Path(hub_id).name
    nearby = [folder / part for part in (path, name) for folder in (checkpoint, checkpoint.parent)]
    for folder in (*([path] if path.is_absolute() else []), *nearby, path):
        is_tower = (folder / "config.json").is_file() and (not with_weights or has_weights(folder))
        if is_tower and folder.resolve() != checkpoint.resolve():
            return str(folder)
    known = next((model_id for model_id in KNOWN_TOWERS if model_id.endswith(f"/{name}")), hub_id)
    if not is_repo_id(known):
        raise DeltaLlavaError(
            f"config.json has mm_vision_tower={named!r}, which is not here; pass the tower's folder or Hub id as vision_tower"
        )
    return known


def load_vision_tower(model_id: str, with_weights: bool) -> VisionTower:
    """Load a tower's settings and, where they are needed, open its weights.

    Args:
        model_id: folder or Hub id of a tower, or of the whole image-text model.
        with_weights: whether the weights are needed; without them a known id needs no download.

    Raises:
        DeltaLlavaError: it is of an unsupported kind, or without the weights asked for.
    """
    if model_id in KNOWN_TOWERS and not with_weights and not Path(model_id).is_dir():
        config, _ = build_config(**KNOWN_TOWERS[model_id])
        return VisionTower(model_id, config, image_processor_settings(config, {}))
    folder = _fetch(model_id, ("config.json", "preprocessor_config.json"), with_weights)
    config = read_tower_config(folder)
    image_processor = image_processor_settings(config, read_optional_json(folder / "preprocessor_config.json"))
    checkpoint = _tower_weights(folder) if with_weights else None
    return VisionTower(public_name(model_id), config, image_processor, checkpoint)


def _tower_weights(folder: Path) -> Checkpoint:
    """The tower's tensors by their names below `vision_model.`; a text model next to it is left out."""
    checkpoint = read_checkpoint(folder)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.endswith(".position_ids")}
    level = "vision_model."
    inner = {name.removeprefix(level): tensor for name, tensor in tensors.items() if name.startswith(level)}
    return Checkpoint(inner or tensors, checkpoint.files)


# LoRA adapters.

# Settings with which an adapter is more than W + B A, or belongs to other weights than the base model's.
_VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "trainable_token_indices"),
    *("layer_replication", "target_parameters", "arrow_config", "kasa_config", "monteclora_config"),
)
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?(A|B)(?:\.default)?(?:\.weight)?")


def merge_lora(
    base: Mapping[str, LazyTensor], adapter: Mapping[str, LazyTensor], settings: Mapping[str, Any], tied: bool = False
) -> dict[str, LazyTensor]:
    """`base` with an adapter's updates added when it is read, to the bits of PEFT's `merge_and_unload`.

    PEFT holds the factors in float32 and adds `(B @ A) * scaling` in place to a weight of whatever dtype, but the update
    of an embedding it first rounds to the embedding's dtype.

    Args:
        base: the base model's tensors, by name.
        adapter: the adapter's, by the base's names (without PEFT's prefix): `X.lora_A.weight` (r, in), `X.lora_B.weight`
            (out, r), and whole tensors that were trained as well, which replace the base's.
        settings: the content of `adapter_config.json`.
        tied: whether the base's head is its embeddings.

    Raises:
        DeltaLlavaError: another kind of adapter, a factor without its partner or its weight, shapes that do not fit each
            other, or changes of only one of two tied weights.
    """
    initialisation = settings.get("init_lora_weights")
    if settings.get("peft_type", "LORA") != "LORA" or initialisation not in _PLAIN_INITIALISATIONS:
        refused = [f"peft_type={settings.get('peft_type')}, init_lora_weights={initialisation}"]
    else:
        refused = [f"{name}={settings[name]}" for name in _VARIANTS if settings.get(name)]
    if refused:
        raise DeltaLlavaError(
            f"{ADAPTER_CONFIG} has {format_names(refused)}, which is not W + B A on the base model's weights; merge the adapter "
            "with PEFT (merge_and_unload) and convert the full checkpoint"
        )
    factors: dict[tuple[str, bool], dict[str, LazyTensor]] = {}
    merged = dict(base)
    changed = set()
    for name, tensor in adapter.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault((match[1], bool(match[2])), {})[match[3]] = tensor
            changed.add(f"{match[1]}.weight")
        elif ".original_module." not in name:  # what `modules_to_save` replaces
            plain = re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", name)
            if plain in changed and not same_bits(merged[plain].load(), tensor.load()):
                raise DeltaLlavaError(f"the adapter holds two different {plain}")
            merged[plain] = tensor
            changed.add(plain)
    if tied and len(changed & {SOURCE_EMBEDDINGS, HEAD}) == 1:
        raise DeltaLlavaError(
            f"the adapter changes {format_names(changed & {SOURCE_EMBEDDINGS, HEAD})}, but config.json ties the head to the "
            "embeddings (tie_word_embeddings), so there is no right result; merge it with PEFT and convert the full checkpoint"
        )
    for (module, is_embedding), pair in factors.items():
        weight = merged.get(f"{module}.weight")
        transposed = is_embedding or bool(settings.get("fan_in_fan_out"))
        if weight is None or pair.keys() != {"A", "B"} or not _fits(weight, pair, transposed):
            raise DeltaLlavaError(
                f"the adapter does not fit {module}: a weight of {weight and weight.shape}, factors of "
                f"{ {name: tensor.shape for name, tensor in pair.items()} }; is this the base model that it was trained on?"
            )
        scaling = _scaling(module, pair["A"].shape[0], settings)
        merged[f"{module}.weight"] = _merge_pair(weight, pair, scaling, transposed, is_embedding)
    return merged


def _fits(weight: LazyTensor, pair: Mapping[str, LazyTensor], transposed: bool) -> bool:
    a, b = pair["A"].shape, pair["B"].shape
    return a[0] == b[1] and weight.shape == ((a[1], b[0]) if transposed else (b[0], a[1]))


def _scaling(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """The factor of `B @ A`, as PEFT chooses it."""
    patterns = (settings.get("alpha_pattern") or {}).items()
    alphas = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(alphas, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _merge_pair(
    weight: LazyTensor, pair: Mapping[str, LazyTensor], scaling: float, transposed: bool, is_embedding: bool
) -> LazyTensor:
    def merge(value: torch.Tensor) -> torch.Tensor:
        update = pair["B"].load().float() @ pair["A"].load().float()
        total = value.clone()
        total += ((update.T if transposed else update) * scaling).to(total.dtype if is_embedding else torch.float32)
        return total

    return weight.map(merge)
