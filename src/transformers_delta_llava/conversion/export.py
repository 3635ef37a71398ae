"""Export a repo of ours as a checkpoint in the released layout, bit for bit."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import REPORT_FILE, DeltaLlavaError, check_output, output_folder, read_optional_json, write_json
from ..hub import IMAGE_TOKEN, TEMPLATE_FILE, TOKENIZER_FILES, is_repo_id
from ..loading import load_config, local_folder
from ..modeling import DeltaLlavaConfig
from .config import DEFAULTS, EXTRA_PREFIX
from .names import (
    CONV_1X1,
    EMBEDDINGS,
    HEAD,
    SOURCE_PROJECTOR,
    new_rows,
    published_name,
    released_name,
    tower_part,
)
from .prompts import EXPORTED_FROM, LANGUAGE_MODELS, language_models_of
from .sources import PROJECTOR_FILE
from .tokenizer import PAD_TOKEN, VIDEO_TOKEN, WORD_MARK_RULE
from .weights import (
    Checkpoint,
    LazyTensor,
    Progress,
    dtype_name,
    read_checkpoint,
    same_bits,
    split_shards,
    write_shards,
)


TOWER_FOLDER = "vision-tower"
_FILES = ("*.json", TEMPLATE_FILE, "model*.safetensors*", "tokenizer.model", "merges.txt")
# Written into config.json by transformers or for a repo of ours; the authors' trainer has other values for them.
_REPO_KEYS = ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ExportReport:
    """Result of `export_checkpoint`.

    Attributes:
        output: the folder.
        weight_files: names of its weight files.
        tensors_written: number of tensors.
        vocab_size: rows of the vocabulary.
        extra_keys: keys of its config that only this package reads, because the released code fixes what they say.
    """

    output: Path
    weight_files: list[str]
    tensors_written: int
    vocab_size: int
    extra_keys: list[str]


def export_checkpoint(
    repo: str | Path,
    output: str | Path,
    *,
    projector_only: bool = False,
    vocab_size: int | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "2GB",
    progress: Progress | None = None,
) -> ExportReport:
    """Write a repo as the released code reads and writes checkpoints; every value stays as it is, bit for bit.

    A converted checkpoint gets its tensors' names, shapes, dtypes and values back, and converting the result gives the
    repo's tensors again. Rows that conversion added for new tokens are left out unless they have changed since; a head
    that is tied to the embeddings is stored once.

    Args:
        repo: folder or Hub id of a repo of the released layout.
        output: folder to write.
        projector_only: write only `mm_projector.bin` and `config.json`.
        vocab_size: rows of the embeddings and the head to keep; by default those that were trained.
        overwrite: replace an output that an earlier export wrote.
        max_shard_size: most bytes of tensors per weight file, as a number or as `2GB`.
        progress: called with the bytes of tensors written so far, and in all.

    Raises:
        DeltaLlavaError: the repo has no counterpart in the released layout, or the output exists.
        OSError: reading or writing failed.
    """
    output = Path(output)
    check_output(output, overwrite)
    folder = local_folder(repo, _FILES)
    config = load_config(folder)
    if config.projector_layout != "released":
        raise DeltaLlavaError(
            f"the repo has projector_layout={config.projector_layout}; only released has names in the released layout"
        )
    noted = read_optional_json(folder / REPORT_FILE)
    checkpoint = read_checkpoint(folder)
    rows = _vocab_size(checkpoint, config, noted.get("trained_vocab_size"), vocab_size)
    # Where conversion read the tower's weights from elsewhere, they stay there.
    tower = noted.get("vision_tower", {})
    tensors = _released_tensors(checkpoint, rows, with_tower=not tower.get("sha256"))
    if projector_only:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(SOURCE_PROJECTOR)}
        shards = {PROJECTOR_FILE: list(tensors)}
    else:
        shards = split_shards(tensors, max_shard_size)
    extras = _extra_settings(config)
    with output_folder(output, overwrite) as new:
        if projector_only:
            torch.save({name: tensor.load().clone() for name, tensor in tensors.items()}, new / PROJECTOR_FILE)
        else:
            write_shards(tensors, shards, new, progress)
            _write_tokenizer(folder, new, rows, noted.get("tokens_added", [IMAGE_TOKEN, VIDEO_TOKEN, PAD_TOKEN]))
            _write_generation_config(folder, new, rows)
        settings = {
            **_text_settings(config.text_config, rows),
            **_released_settings(folder, config, noted),
            **extras,
            "mm_vision_tower": _write_tower(folder, config, tower.get("name"), new),
            "torch_dtype": dtype_name(checkpoint.tensors[EMBEDDINGS].dtype),
            "vocab_size": rows,
        }
        write_json(json.loads(json.dumps(settings, default=str)), new / "config.json")
        # Marks the folder as one that may be overwritten, and keeps what the released layout has no place for.
        origin = {name: noted[name] for name in ("chat_template", "chat_template_reason") if noted.get(name)}
        write_json({EXPORTED_FROM: noted.get("source", {}).get("name", folder.name), **origin}, new / REPORT_FILE)
    return ExportReport(output, list(shards), len(tensors), rows, sorted(extras))


def _released_tensors(checkpoint: Checkpoint, vocab_size: int, with_tower: bool) -> dict[str, LazyTensor]:
    """A repo's tensors in the released names and shapes, embeddings and head cut to `vocab_size` rows."""
    tensors: dict[str, LazyTensor] = {}
    for given, tensor in checkpoint.tensors.items():
        name = published_name(given)
        if name in (EMBEDDINGS, HEAD):
            shape = (vocab_size, *tensor.shape[1:])
            tensors[released_name(name)] = tensor.map(lambda value: value[:vocab_size], shape)
        elif with_tower or tower_part(name) is None:
            tensors[released_name(name)] = tensor.reshape((*tensor.shape, 1, 1)) if name in CONV_1X1 else tensor
    return tensors


def _vocab_size(checkpoint: Checkpoint, config: DeltaLlavaConfig, trained: int | None, requested: int | None) -> int:
    """Rows of the vocabulary to keep: those that were `trained`, if the others are still as conversion wrote them."""
    tables = [checkpoint.tensors[name] for name in (EMBEDDINGS, HEAD) if name in checkpoint.tensors]
    size = tables[0].shape[0]
    if requested is not None:
        if not 0 < requested <= size:
            raise DeltaLlavaError(f"vocab_size={requested} is not between 1 and the repo's {size} rows")
        return requested
    if trained is None or trained >= size:
        return size
    for table, mean_row in zip(tables, (config.image_token_id, None)):
        values = table.load()
        if not same_bits(new_rows(values[:trained], size, mean_row), values[trained:]):
            return size
    return trained


def _text_settings(text: PreTrainedConfig, rows: int) -> dict[str, Any]:
    """The language model's config as transformers 4 wrote it, which the released code runs on."""
    values = {key: value for key, value in text.to_dict().items() if key not in _REPO_KEYS}
    # nn.Embedding refuses a padding row that it does not have.
    for key in _TOKEN_IDS:
        values[key] = _known_ids(values.get(key), rows)
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        values["rope_theta"] = rope.pop("rope_theta", None)
        rotary = rope.pop("partial_rotary_factor", 1)
        if rotary != 1:
            values["partial_rotary_factor"] = rotary
        kind = rope.get("rope_type", "default")
        if "original_max_position_embeddings" in values:  # Phi-3 keeps it outside, and only its two factors inside
            rope = {"type": kind, **{key: rope[key] for key in ("short_factor", "long_factor") if key in rope}}
        values["rope_scaling"] = None if kind == "default" else rope
    return values


def _known_ids(ids: int | list[int] | None, rows: int) -> int | list[int] | None:
    if isinstance(ids, list):
        return [i for i in ids if i < rows] or None
    return ids if ids is not None and ids < rows else None


def _extra_settings(config: DeltaLlavaConfig) -> dict[str, Any]:
    """Keys for settings that the released code fixes and this model has otherwise."""
    values = {field: getattr(config, field) for field in DEFAULTS}
    values["vision_feature_levels"] = tuple(config.vision_feature_levels)
    return {EXTRA_PREFIX + field: value for field, value in values.items() if value != DEFAULTS[field]}


def _released_settings(folder: Path, config: DeltaLlavaConfig, noted: dict[str, Any]) -> dict[str, Any]:
    """The authors' own keys, except for the vision tower."""
    families = language_models_of(config.text_config.model_type)
    if not families:
        known = ", ".join(sorted({model.text_model_type for model in LANGUAGE_MODELS.values()}))
        raise DeltaLlavaError(
            f"the released code has no language model {config.text_config.model_type}; it has {known}"
        )
    source_type = noted.get("source", {}).get("model_type")
    model_type = source_type if source_type in families else next(iter(families))
    processor = read_optional_json(folder / "processor_config.json")
    grids = processor.get("image_grid_pinpoints")
    values = {
        "architectures": [families[model_type].architecture],
        "image_aspect_ratio": "anyres" if grids else "pad" if processor.get("do_pad", True) else "square",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "delatallava",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "model_type": model_type,
        "scale_factor": config.scale_factor,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_mm_proj": True,
    }
    if grids:
        values["image_grid_pinpoints"] = [[width, height] for height, width in grids]
    base_models = noted.get("base_models", [])
    if base_models and base_models[0] != noted["vision_tower"]["name"]:
        values["_name_or_path"] = base_models[0]
    length = read_optional_json(folder / "tokenizer_config.json").get("model_max_length")
    # transformers writes a length that no tokenizer has where none was set.
    if length is not None and length < 10**9:
        values["tokenizer_model_max_length"] = length
    return values


def _write_tower(folder: Path, config: DeltaLlavaConfig, name: str | None, output: Path) -> str:
    """The tower's name for `mm_vision_tower`: its Hub id, or a folder of its settings, written next to the weights."""
    if name is not None and is_repo_id(name):
        return name
    tower = output / TOWER_FOLDER
    tower.mkdir()
    config.vision_config.to_json_file(tower / "config.json")
    settings = read_optional_json(folder / "processor_config.json").get("image_processor")
    if settings is not None:
        write_json(settings, tower / "preprocessor_config.json")
    return TOWER_FOLDER


def _write_tokenizer(folder: Path, output: Path, rows: int, added: list[str]) -> None:
    """Copy the tokenizer, without the tokens that conversion `added` and that have no row in the embeddings.

    The released code resizes the embeddings to the tokenizer's length when it loads a checkpoint: each token without a row
    would get a random one.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)
    path = output / "tokenizer.json"
    tokenizer = read_optional_json(path)
    tokens = tokenizer.get("added_tokens", [])
    removed = {token["content"] for token in tokens if token["content"] in added and token["id"] >= rows}
    if removed:
        tokenizer["added_tokens"] = [token for token in tokens if token["content"] not in removed]
        match tokenizer.get("normalizer"):  # the rule for text after an image goes with the image token
            case {"normalizers": [{"pattern": {"Regex": rule}}, *rest]} if str(rule).startswith(WORD_MARK_RULE):
                tokenizer["normalizer"] = rest[0] if rest else None
        path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    settings = read_optional_json(output / "tokenizer_config.json")
    for key, value in list(settings.items()):
        if isinstance(value, list):
            settings[key] = [token for token in value if str(token) not in removed]
        elif str(value) in removed:
            del settings[key]
    # transformers 5 writes a list where 4 expects a dictionary with names for the tokens.
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings:
        write_json(settings, output / "tokenizer_config.json")


def _write_generation_config(folder: Path, output: Path, rows: int) -> None:
    """Copy the settings without ids that the embeddings no longer have: they would stop the authors' generation."""
    values = read_optional_json(folder / "generation_config.json")
    if not values:
        return
    for key in (*_TOKEN_IDS, "suppress_tokens"):
        values[key] = _known_ids(values.get(key), rows)
    write_json({key: value for key, value in values.items() if value is not None}, output / "generation_config.json")
