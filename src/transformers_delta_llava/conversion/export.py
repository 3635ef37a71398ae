"""The way back: a repo of ours becomes a checkpoint in the authors' layout, bit for bit."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..hub.tokenizer import IMAGE_TOKEN, PAD_TOKEN, TEMPLATE_FILE, TOKENIZER_FILES, WORD_MARK_RULE
from ..modeling import DeltaLlavaConfig
from ..modeling.delta_repo_delta_llava import dtype_name
from ..utils.errors import DeltaLlavaError, explain_errors, format_names
from ..utils.files import (
    EXPORTED_FROM,
    REPORT_FILE,
    atomic_folder,
    check_output,
    is_repo_id,
    local_folder,
    read_json,
    write_json,
)
from ..utils.validation import FileModel, check_sizes, read_model
from .checkpoint import Checkpoint, LazyTensor, Progress, parse_size, read_checkpoint, same_bits, write_shards
from .config_mapping import DEFAULTS, OWN_PREFIX
from .language_models import LANGUAGE_MODELS
from .sources import PROJECTOR_FILE
from .weight_mapping import (
    EMBEDDINGS,
    HEAD,
    RULES,
    SOURCE_PROJECTOR,
    TOWER_TARGET,
    Rule,
    Shape,
    new_rows,
    published_name,
)


TOWER_FOLDER = "vision-tower"
_FILES = ("*.json", TEMPLATE_FILE, "model*.safetensors*", "tokenizer.model", "merges.txt")
# Written into config.json by transformers or for a repo of ours; the authors' trainer has other values for them.
_OWN_KEYS = ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        output: the folder.
        weight_files: names of its weight files.
        tensors_written: number of tensors.
        vocab_size: rows of the vocabulary.
        own_keys: keys of its config that only this package reads, because the released code fixes what they say.
    """

    output: Path
    weight_files: list[str]
    tensors_written: int
    vocab_size: int
    own_keys: list[str]


class _Origin(FileModel):
    name: str | None = None
    model_type: str | None = None
    sha256: dict[str, str] = {}


class _Conversion(FileModel):
    """What export needs of a repo's `conversion.json`."""

    source: _Origin = _Origin()
    vision_tower: _Origin = _Origin()
    base_models: list[str] = []
    chat_template: str | None = None
    chat_template_reason: str | None = None
    tokens_added: list[str] = [IMAGE_TOKEN, PAD_TOKEN]
    trained_vocab_size: int | None = None


def export_checkpoint(
    repo: str | Path,
    output: str | Path,
    *,
    projector_only: bool = False,
    vocab_size: int | None = None,
    vision_tower: bool | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "2GB",
    progress: Progress | None = None,
) -> ExportReport:
    """Write a repo as the authors' code reads and writes checkpoints; every value stays as it is, bit for bit.

    A checkpoint that was converted comes back with its tensors' names, shapes, dtypes and values; converting the
    result gives the repo's tensors again. Rows that conversion added for new tokens are left out where they still are
    what it put there; a head that is tied to the embeddings is stored once.

    Args:
        repo: folder or Hub id of a repo of the released layout.
        output: folder to write.
        projector_only: write `mm_projector.bin` and `config.json` alone.
        vocab_size: rows of the embeddings and the head to keep; by default those that were trained.
        vision_tower: whether to write the tower's weights; by default where the checkpoint that was converted had them,
            and always for a repo that was not converted.
        overwrite: replace an output that an earlier export wrote.
        max_shard_size: most bytes of tensors per weight file, as a number or as `2GB`.
        progress: called with the bytes of tensors handled so far, and in all.

    Raises:
        DeltaLlavaError: one sentence on why there is no output.
        OSError: reading or writing failed.
    """
    shard_size, output = parse_size(max_shard_size), Path(output)
    folder = local_folder(str(repo), "repo", _FILES)
    check_output(output, [folder], overwrite)
    config = read_repo_config(folder)
    _check_layout(config)
    conversion = _read_conversion(folder)
    checkpoint = read_checkpoint(folder)
    rows = _rows(checkpoint, config, conversion, vocab_size)
    if vision_tower is None:
        vision_tower = not conversion.vision_tower.sha256
    tensors = released_tensors(checkpoint, rows, vision_tower)
    if projector_only:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(SOURCE_PROJECTOR)}
    with atomic_folder(output, overwrite) as tmp_dir:
        if projector_only:
            files = [PROJECTOR_FILE]
            torch.save({name: tensor.load().clone() for name, tensor in tensors.items()}, tmp_dir / PROJECTOR_FILE)
        else:
            files = write_shards(tensors, tmp_dir, shard_size, progress)
            _write_tokenizer(folder, tmp_dir, rows, conversion.tokens_added)
            _write_generation_config(folder, tmp_dir, rows)
        own = _own_settings(config)
        settings = {
            **_text_settings(config.text_config, rows),
            **_released_settings(folder, config, conversion),
            **own,
            "mm_vision_tower": _write_tower(folder, config, conversion, tmp_dir),
            "torch_dtype": dtype_name(checkpoint.tensors[EMBEDDINGS].dtype),
            "vocab_size": rows,
        }
        write_json(json.loads(json.dumps(settings, default=str)), tmp_dir / "config.json")
        # Marks the folder as one that may be overwritten, and keeps for a conversion what no checkpoint says.
        origin = {
            EXPORTED_FROM: conversion.source.name or folder.name,
            "chat_template": conversion.chat_template,
            "chat_template_reason": conversion.chat_template_reason,
        }
        write_json({key: value for key, value in origin.items() if value is not None}, tmp_dir / REPORT_FILE)
    return ExportReport(output, files, len(tensors), rows, sorted(own))


def read_repo_config(folder: Path) -> DeltaLlavaConfig:
    """The config of a repo; DeltaLlavaError where there is none or it is not a Delta-LLaVA repo's."""
    if not (folder / "config.json").is_file():
        raise DeltaLlavaError(f"The repo {folder.name} has no config.json.")
    values = read_json(folder / "config.json")
    if values.get("model_type") != "delta_llava":
        raise DeltaLlavaError(
            f"{folder.name} is not a Delta-LLaVA repo: its config.json has model_type={values.get('model_type')!r}."
        )
    what = f"The config.json of {folder.name} is not usable"
    check_sizes(values, what)
    with explain_errors(what):
        return DeltaLlavaConfig.from_dict(values)


def released_tensors(checkpoint: Checkpoint, vocab_size: int, vision_tower: bool) -> dict[str, LazyTensor]:
    """A repo's tensors under the authors' names and in their shapes, embeddings and head cut to `vocab_size` rows.

    Raises:
        DeltaLlavaError: listing tensors that the released layout has no name for.
    """
    found: dict[str, LazyTensor] = {}
    unknown = []
    for given, tensor in checkpoint.tensors.items():
        name = published_name(given)
        row = next(((source, rule) for rule in _BACK if (source := rule.rename(name)) is not None), None)
        if row is None:
            unknown.append(name)
        elif name in (EMBEDDINGS, HEAD):
            found[row[0]] = _cut(tensor, vocab_size)
        elif vision_tower or not name.startswith(TOWER_TARGET):
            found[row[0]] = _with_axes(tensor) if row[1].shape is Shape.CONV_1X1 else tensor
    if unknown:
        raise DeltaLlavaError(f"The released layout has no name for {format_names(unknown)}.")
    return found


_BACK = tuple(Rule(rule.target, rule.source, rule.shape) for rule in RULES)


def _with_axes(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor((*tensor.shape, 1, 1), tensor.dtype, lambda: tensor.load()[:, :, None, None])


def _cut(tensor: LazyTensor, rows: int) -> LazyTensor:
    return LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.load()[:rows])


def _read_conversion(folder: Path) -> _Conversion:
    path = folder / REPORT_FILE
    return read_model(path, _Conversion) if path.is_file() else _Conversion()


def _check_layout(config: DeltaLlavaConfig) -> None:
    if config.projector_layout != "released":
        raise DeltaLlavaError(
            f"The repo has projector_layout={config.projector_layout!r}, for which the authors' layout has no names; only "
            "'released' can be exported."
        )


def _rows(checkpoint: Checkpoint, config: DeltaLlavaConfig, conversion: _Conversion, wanted: int | None) -> int:
    """How many rows of the vocabulary to keep: as many as were trained, if the others are as conversion made them."""
    tables = [checkpoint.tensors[name] for name in (EMBEDDINGS, HEAD) if name in checkpoint.tensors]
    if not tables or any(len(table.shape) != 2 for table in tables):
        raise DeltaLlavaError(f"The repo holds no {EMBEDDINGS} with a row for each token.")
    size = tables[0].shape[0]
    if wanted is not None:
        if not 0 < wanted <= size:
            raise DeltaLlavaError(f"vocab_size={wanted} is not between 1 and the repo's {size} rows.")
        return wanted
    trained = conversion.trained_vocab_size
    if trained is None or not 0 < trained < size:
        return size
    image_rows = (config.image_token_id, None)
    for table, image_row in zip(tables, image_rows):
        values = table.load()
        if not same_bits(new_rows(values[:trained], size, image_row), values[trained:]):
            return size
    return trained


def _text_settings(text: PreTrainedConfig, rows: int) -> dict:
    """The language model's config as transformers 4 wrote it, which the authors' code runs on."""
    values = {key: value for key, value in text.to_dict().items() if key not in _OWN_KEYS}
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


def _own_settings(config: DeltaLlavaConfig) -> dict:
    """Keys for what the released code fixes and this model does otherwise."""
    given = {field: getattr(config, field) for field in DEFAULTS}
    given["vision_feature_levels"] = tuple(config.vision_feature_levels)
    return {OWN_PREFIX + field: value for field, value in given.items() if value != DEFAULTS[field]}


def _released_settings(folder: Path, config: DeltaLlavaConfig, conversion: _Conversion) -> dict:
    """The authors' own keys, but for the vision tower."""
    model_type = _model_type(config.text_config, conversion.source.model_type)
    processor = read_json(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    length = settings.get("model_max_length")
    values = {
        "architectures": [_ARCHITECTURES[config.text_config.model_type]],
        "image_aspect_ratio": "pad" if processor.get("do_pad", True) else "square",
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
    # A length that no tokenizer has means that nobody set one.
    if type(length) is int and length < 10**9:
        values["tokenizer_model_max_length"] = length
    return values


def _model_type(text: PreTrainedConfig, converted_from: str | None) -> str:
    """The `model_type` of the checkpoint that was converted, or the first of those for the language model."""
    names = [name for name, family in LANGUAGE_MODELS.items() if family.text_model_type == text.model_type]
    if not names:
        known = ", ".join(sorted({family.text_model_type for family in LANGUAGE_MODELS.values()}))
        raise DeltaLlavaError(f"The authors' code has no language model of type {text.model_type}; it has {known}.")
    return converted_from if converted_from in names else names[0]


# By the type of the language model.
_ARCHITECTURES = {
    "llama": "LlavaLlamaForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
    "gemma": "LlavaGemmaForCausalLM",
    "phi3": "LlavaPhi3ForCausalLM",
    "seed_oss": "LlavaSeedOssForCausalLM",
    "qwen2": "LlavaQwenForCausalLM",
    "qwen3": "LlavaQwen3ForCausalLM",
}


def _write_tower(folder: Path, config: DeltaLlavaConfig, conversion: _Conversion, output: Path) -> str:
    """The tower's name for `mm_vision_tower`: its Hub id, or a folder of its settings written beside the weights."""
    name = conversion.vision_tower.name
    if name is not None and is_repo_id(name):
        return name
    tower = output / TOWER_FOLDER
    tower.mkdir()
    config.vision_config.to_json_file(tower / "config.json")
    if (folder / "processor_config.json").is_file():
        settings = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(settings, dict):
            write_json(settings, tower / "preprocessor_config.json")
    return TOWER_FOLDER


def _write_tokenizer(folder: Path, output: Path, rows: int, added: list[str]) -> None:
    """Copy the tokenizer without those tokens that conversion `added` and that no row of the embeddings belongs to."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)
    gone = _drop_tokens(output / "tokenizer.json", rows, added) if (output / "tokenizer.json").is_file() else set()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (output / name).is_file():
            write_json(_in_words_of_transformers_4(_without(read_json(output / name), gone)), output / name)


def _drop_tokens(path: Path, rows: int, added: list[str]) -> set[str]:
    """Take those tokens out of a `tokenizer.json`, and the rule for images with the image token; returns them."""
    tokenizer = read_json(path)
    entries = tokenizer.get("added_tokens")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return set()
    gone = {
        e.get("content")
        for e in entries
        if e.get("content") in added and isinstance(e.get("id"), int) and e["id"] >= rows
    }
    if gone:
        tokenizer["added_tokens"] = [entry for entry in entries if entry.get("content") not in gone]
        tokenizer["normalizer"] = _without_image_rule(tokenizer.get("normalizer"))
        path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    return gone


def _in_words_of_transformers_4(settings: dict) -> dict:
    """A tokenizer's settings, which transformers 5 writes with a list where 4 expects names for the tokens."""
    if not isinstance(settings.get("extra_special_tokens"), list):
        return settings
    kept = {key: value for key, value in settings.items() if key != "extra_special_tokens"}
    return {**kept, "additional_special_tokens": settings["extra_special_tokens"]}


def _without_image_rule(normalizer: object) -> object:
    """A tokenizer's normalizer without the rule that conversion put before it."""
    match normalizer:
        case {"normalizers": [{"pattern": {"Regex": rule}}, *rest]} if str(rule).startswith(WORD_MARK_RULE):
            return rest[0] if rest else None
    return normalizer


def _without(settings: dict, tokens: set[str]) -> dict:
    """`settings` of a tokenizer without some tokens, by whatever key they stand."""

    def is_gone(value: object) -> bool:
        return (value.get("content") if isinstance(value, dict) else value) in tokens

    kept: dict = {}
    for key, value in settings.items():
        if key in tokens or (isinstance(value, (str, dict)) and is_gone(value)):
            continue
        if isinstance(value, list):
            value = [entry for entry in value if not (isinstance(entry, (str, dict)) and is_gone(entry))]
        elif key == "added_tokens_decoder" and isinstance(value, dict):
            value = {number: entry for number, entry in value.items() if not is_gone(entry)}
        kept[key] = value
    return kept


def _write_generation_config(folder: Path, output: Path, rows: int) -> None:
    """Copy the settings; ids that the embeddings no longer have would stop the authors' generation."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    values = read_json(path)
    for key in (*_TOKEN_IDS, "suppress_tokens"):
        values[key] = _known_ids(values.get(key), rows)
    write_json({key: value for key, value in values.items() if value is not None}, output / "generation_config.json")
