"""Export a repo of ours as a checkpoint in the authors' layout, bit for bit."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..hub.repo_files import TEMPLATE_FILE, TOKENIZER_FILES
from ..modeling import DeltaLlavaConfig
from ..modeling.delta_repo_delta_llava import dtype_name
from ..utils.errors import DeltaLlavaError, explain_errors, show
from ..utils.files import (
    REPORT_FILE,
    atomic_folder,
    check_output,
    is_repo_id,
    local_folder,
    read_json,
    read_optional_json,
    write_json,
)
from ..utils.validation import check_sizes, validate
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
from .report import ConversionReport
from .sources import PROJECTOR_FILE
from .tokenizer import WORD_MARK_RULE
from .weights import Checkpoint, LazyTensor, Progress, read_checkpoint, same_bits, split_shards, write_shards


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
    """Write a repo as the authors' code reads and writes checkpoints; every value stays as it is, bit for bit.

    A converted checkpoint gets its tensors' names, shapes, dtypes and values back, and converting the result gives the
    repo's tensors again. Rows that conversion added for new tokens are left out unless they have changed since; a head
    that is tied to the embeddings is stored once.

    Args:
        repo: folder or Hub id of a repo of the released layout.
        output: folder to write.
        projector_only: write `mm_projector.bin` and `config.json` alone.
        vocab_size: rows of the embeddings and the head to keep; by default those that were trained.
        overwrite: replace an output that an earlier export wrote.
        max_shard_size: most bytes of tensors per weight file, as a number or as `2GB`.
        progress: called with the bytes of tensors written so far, and in all.

    Raises:
        DeltaLlavaError: one sentence on why there is no output.
        OSError: reading or writing failed.
    """
    output = Path(output)
    folder = local_folder(str(repo), "repo", _FILES)
    check_output(output, [folder], overwrite)
    config = read_repo_config(folder)
    if config.projector_layout != "released":
        raise DeltaLlavaError(
            f"The repo has projector_layout={config.projector_layout!r}, for which the authors' layout has no names; only "
            "'released' can be exported."
        )
    conversion = validate(ConversionReport, read_optional_json(folder / REPORT_FILE), REPORT_FILE)
    checkpoint = read_checkpoint(folder)
    rows = _vocab_size(checkpoint, config, conversion, vocab_size)
    # Where conversion read the tower's weights from elsewhere, they stay there.
    tensors = _released_tensors(checkpoint, rows, with_tower=not conversion.vision_tower.sha256)
    if projector_only:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(SOURCE_PROJECTOR)}
        shards = {PROJECTOR_FILE: list(tensors)}
    else:
        shards = split_shards(tensors, max_shard_size)
    extras = _extra_settings(config)
    with atomic_folder(output, overwrite) as tmp_dir:
        if projector_only:
            torch.save({name: tensor.load().clone() for name, tensor in tensors.items()}, tmp_dir / PROJECTOR_FILE)
        else:
            write_shards(tensors, shards, tmp_dir, progress)
            _write_tokenizer(folder, tmp_dir, rows, conversion.tokens_added)
            _write_generation_config(folder, tmp_dir, rows)
        settings = {
            **_text_settings(config.text_config, rows),
            **_released_settings(folder, config, conversion),
            **extras,
            "mm_vision_tower": _write_tower(folder, config, conversion.vision_tower.name, tmp_dir),
            "torch_dtype": dtype_name(checkpoint.tensors[EMBEDDINGS].dtype),
            "vocab_size": rows,
        }
        write_json(json.loads(json.dumps(settings, default=str)), tmp_dir / "config.json")
        # Marks the folder as one that may be overwritten, and keeps what the authors' layout has no place for.
        origin = {
            EXPORTED_FROM: conversion.source.name or folder.name,
            "chat_template": conversion.chat_template,
            "chat_template_reason": conversion.chat_template_reason,
        }
        write_json({key: value for key, value in origin.items() if value is not None}, tmp_dir / REPORT_FILE)
    return ExportReport(output, list(shards), len(tensors), rows, sorted(extras))


def read_repo_config(folder: Path) -> DeltaLlavaConfig:
    """The config of a repo; DeltaLlavaError where there is none or it is not a Delta-LLaVA repo's."""
    if not (folder / "config.json").is_file():
        raise DeltaLlavaError(f"The repo {folder.name} has no config.json.")
    values = read_json(folder / "config.json")
    if values.get("model_type") != "delta_llava":
        raise DeltaLlavaError(
            f"{folder.name} is not a Delta-LLaVA repo: its config.json has model_type={show(values.get('model_type'))}."
        )
    what = f"The config.json of {folder.name} is not usable"
    check_sizes(values, what)
    with explain_errors(what):
        return DeltaLlavaConfig.from_dict(values)


def _released_tensors(checkpoint: Checkpoint, vocab_size: int, with_tower: bool) -> dict[str, LazyTensor]:
    """A repo's tensors under the authors' names and in their shapes, embeddings and head cut to `vocab_size` rows."""
    tensors: dict[str, LazyTensor] = {}
    for given, tensor in checkpoint.tensors.items():
        name = published_name(given)
        source = released_name(name)
        if name in (EMBEDDINGS, HEAD):
            shape = (vocab_size, *tensor.shape[1:])
            tensors[source] = tensor.map(lambda value: value[:vocab_size], shape)
        elif with_tower or tower_part(name) is None:
            tensors[source] = tensor.reshape((*tensor.shape, 1, 1)) if name in CONV_1X1 else tensor
    return tensors


def _vocab_size(
    checkpoint: Checkpoint, config: DeltaLlavaConfig, conversion: ConversionReport, requested: int | None
) -> int:
    """Rows of the vocabulary to keep: those that were trained, if the others are still as conversion wrote them."""
    tables = [checkpoint.tensors[name] for name in (EMBEDDINGS, HEAD) if name in checkpoint.tensors]
    if not tables or any(len(table.shape) != 2 for table in tables):
        raise DeltaLlavaError(f"The repo holds no {EMBEDDINGS} with a row for each token.")
    size = tables[0].shape[0]
    if requested is not None:
        if not 0 < requested <= size:
            raise DeltaLlavaError(f"vocab_size={requested} is not between 1 and the repo's {size} rows.")
        return requested
    trained = conversion.trained_vocab_size
    if trained is None or not 0 < trained < size:
        return size
    for table, mean_row in zip(tables, (config.image_token_id, None)):
        values = table.load()
        if not same_bits(new_rows(values[:trained], size, mean_row), values[trained:]):
            return size
    return trained


def _text_settings(text: PreTrainedConfig, rows: int) -> dict:
    """The language model's config as transformers 4 wrote it, which the authors' code runs on."""
    values = {key: value for key, value in text.to_dict().items() if key not in _REPO_KEYS}
    # nn.Embedding refuses a padding row that it does not have.
    for key in _TOKEN_IDS:
        values[key] = _known_ids(values.get(key), rows)
    rope = values.pop("rope_parameters", None)
    if isinstance(rope, dict):
        values["rope_theta"] = rope.pop("rope_theta", None)
        rotary = rope.pop("partial_rotary_factor", 1)
        if rotary != 1:
            values["partial_rotary_factor"] = rotary
        kind = rope.get("rope_type", "default")
        if "original_max_position_embeddings" in values:  # Phi-3 keeps it outside, and its two factors alone inside
            rope = {"type": kind, **{key: rope[key] for key in ("short_factor", "long_factor") if key in rope}}
        values["rope_scaling"] = None if kind == "default" else rope
    return values


def _known_ids(ids: object, rows: int) -> object:
    if isinstance(ids, list):
        return [i for i in ids if type(i) is int and i < rows] or None
    return ids if type(ids) is int and ids < rows else None


def _extra_settings(config: DeltaLlavaConfig) -> dict[str, Any]:
    """Keys for settings that the released code fixes and this model has otherwise."""
    values = {field: getattr(config, field) for field in DEFAULTS}
    values["vision_feature_levels"] = tuple(config.vision_feature_levels)
    return {EXTRA_PREFIX + field: value for field, value in values.items() if value != DEFAULTS[field]}


def _released_settings(folder: Path, config: DeltaLlavaConfig, conversion: ConversionReport) -> dict[str, Any]:
    """The authors' own keys, except for the vision tower."""
    families = language_models_of(config.text_config.model_type)
    if not families:
        known = ", ".join(sorted({model.text_model_type for model in LANGUAGE_MODELS.values()}))
        raise DeltaLlavaError(
            f"The authors' code has no language model of type {config.text_config.model_type}; it has {known}."
        )
    source_type = conversion.source.model_type
    model_type = source_type if source_type in families else next(iter(families))
    length = read_optional_json(folder / "tokenizer_config.json").get("model_max_length")
    do_pad = read_optional_json(folder / "processor_config.json").get("do_pad", True)
    values = {
        "architectures": [families[model_type].architecture],
        "image_aspect_ratio": "pad" if do_pad else "square",
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
    if conversion.base_models and conversion.base_models[0] != conversion.vision_tower.name:
        values["_name_or_path"] = conversion.base_models[0]
    # transformers writes a length that no tokenizer has where nobody set one.
    if type(length) is int and length < 10**9:
        values["tokenizer_model_max_length"] = length
    return values


def _write_tower(folder: Path, config: DeltaLlavaConfig, name: str | None, output: Path) -> str:
    """The tower's name for `mm_vision_tower`: its Hub id, or a folder of its settings written beside the weights."""
    if name is not None and is_repo_id(name):
        return name
    tower = output / TOWER_FOLDER
    tower.mkdir()
    config.vision_config.to_json_file(tower / "config.json")
    settings = read_optional_json(folder / "processor_config.json").get("image_processor")
    if isinstance(settings, dict):
        write_json(settings, tower / "preprocessor_config.json")
    return TOWER_FOLDER


def _write_tokenizer(folder: Path, output: Path, rows: int, added: list[str]) -> None:
    """Copy the tokenizer, without the tokens that conversion `added` and that have no row in the embeddings."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)
    removed = _remove_tokens(output / "tokenizer.json", rows, added)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (output / name).is_file():
            settings = _without_tokens(read_json(output / name), removed)
            # transformers 5 writes a list where 4 expects a dictionary with names for the tokens.
            if isinstance(settings.get("extra_special_tokens"), list):
                settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
            write_json(settings, output / name)


def _remove_tokens(path: Path, rows: int, added: list[str]) -> set[str]:
    """Remove these tokens from a `tokenizer.json`, and with them the rule for text after an image; returns the tokens."""
    tokenizer = read_optional_json(path)
    entries = tokenizer.get("added_tokens")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return set()
    removed = {
        entry.get("content")
        for entry in entries
        if entry.get("content") in added and isinstance(entry.get("id"), int) and entry["id"] >= rows
    }
    if removed:
        tokenizer["added_tokens"] = [entry for entry in entries if entry.get("content") not in removed]
        match tokenizer.get("normalizer"):
            case {"normalizers": [{"pattern": {"Regex": rule}}, *rest]} if str(rule).startswith(WORD_MARK_RULE):
                tokenizer["normalizer"] = rest[0] if rest else None
        path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    return removed


def _without_tokens(settings: dict, tokens: set[str]) -> dict:
    """A tokenizer's `settings` without some tokens, as keys, values and entries of lists."""

    def is_kept(value: object) -> bool:
        token = value.get("content") if isinstance(value, dict) else value
        return not isinstance(token, str) or token not in tokens

    kept: dict = {}
    for key, value in settings.items():
        if key in tokens or not is_kept(value):
            continue
        if isinstance(value, list):
            value = [entry for entry in value if is_kept(entry)]
        elif key == "added_tokens_decoder" and isinstance(value, dict):
            value = {number: entry for number, entry in value.items() if is_kept(entry)}
        kept[key] = value
    return kept


def _write_generation_config(folder: Path, output: Path, rows: int) -> None:
    """Copy the settings without ids that the embeddings no longer have: they would stop the authors' generation."""
    values = read_optional_json(folder / "generation_config.json")
    if not values:
        return
    for key in (*_TOKEN_IDS, "suppress_tokens"):
        values[key] = _known_ids(values.get(key), rows)
    write_json({key: value for key, value in values.items() if value is not None}, output / "generation_config.json")
