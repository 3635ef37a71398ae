"""Convert a trained checkpoint in the released layout to a Hub repo."""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..errors import (
    REPORT_FILE,
    DeltaLlavaError,
    check_output,
    output_folder,
    read_optional_json,
    sha256_of,
    write_json,
)
from ..hub import (
    TEMPLATE_FILE,
    ModelCard,
    check_repo,
    describe_code,
    hub_id_of,
    public_name,
    write_code,
    write_config,
    write_processor,
)
from ..loading import DTYPES, local_folder
from .config import convert_config, processor_settings
from .names import EMBEDDINGS, TensorPlan, find_delta_rank, plan_tensors
from .prompts import ChatTemplate, chat_template_warnings, fit_generation_config, keep_valid_flags
from .sources import Source, open_source
from .tokenizer import check_token_ids, padded_vocab_size, save_tokenizer
from .weights import Progress, dtype_name, split_shards, verify_archives, verify_shards, write_shards


@dataclass(frozen=True)
class ConversionReport:
    """Result of `convert_checkpoint`.

    Attributes:
        output: the repo folder.
        weight_files: names of its weight files.
        num_visual_tokens: visual tokens per image by default.
        tensors_read: how many of the source's tensors were used; `ignored` maps the others to reasons.
        tensors_written: how many tensors the repo has, those of the vision tower included.
        chat_template: the chosen one, with the reason.
        license, base_models: what the card names.
        warnings: what the user should know.
    """

    output: Path
    weight_files: list[str]
    num_visual_tokens: int
    tensors_read: int
    tensors_written: int
    ignored: dict[str, str]
    chat_template: ChatTemplate
    license: str | None
    base_models: list[str]
    warnings: list[str]


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    base_model: str | Path | None = None,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    chat_template: str | None = None,
    scale_factor: int | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "2GB",
    verify: bool = False,
    progress: Progress | None = None,
    verify_progress: Progress | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    base_models: Sequence[str] = (),
) -> ConversionReport:
    """Convert a checkpoint into a folder that loads with `trust_remote_code` where this package is not installed.

    The output appears complete or not at all. The source is only read, and no code from it is run. Tensors stay as they
    are, bit for bit, unless `dtype` asks otherwise; the embeddings get rows for new tokens.

    Args:
        source: folder or Hub id with `config.json` and weights: a full checkpoint (safetensors, `.bin` or `.pt`), with or without
            the vision tower's; a projector only (`mm_projector.bin`); or a LoRA run (`adapter_model.*` with
            `non_lora_trainables.bin`), which is merged as PEFT merges.
        output: folder to write.
        base_model: folder or Hub id of the language model that a projector or a LoRA run was trained on.
        vision_tower: folder or Hub id of the tower. By default the one that the checkpoint's config names.
        tokenizer: folder or Hub id of the tokenizer. By default the source's own.
        dtype: `float32`, `bfloat16` or `float16` to cast all weights; by default each keeps its own.
        chat_template: name of a conversation format, `tokenizer` for the tokenizer's own, or a Jinja file. By default what
            the checkpoint was tuned with, as far as it tells.
        scale_factor: the one that the checkpoint was trained with, where its config does not say.
        overwrite: replace an output that an earlier conversion wrote.
        max_shard_size: most bytes of tensors per weight file, as a number or as `2GB`.
        verify: compare `.bin` files with the checksums in them, then read the written tensors back and compare each with
            its source, bit by bit, before the output appears.
        progress: called with the bytes of tensors written so far, and in all; `verify_progress` the same while verifying.
        repo_id: Hub id that the model card's examples name. By default they name the output folder.
        license: for the card, as the Hub names it; by default the language model's, where that is known.
        base_models: Hub ids for the card; by default what the checkpoint states.

    Raises:
        DeltaLlavaError: the source or an option cannot be used, or the output exists.
        ValueError: from `DeltaLlavaConfig`, on settings that no Delta-LLaVA model can have.
        OSError: reading or writing failed.
    """
    output = Path(output)
    check_output(output, overwrite)
    cast_to = _cast_to(dtype)
    opened = open_source(
        local_folder(source),
        base_model=str(base_model) if base_model else None,
        vision_tower=str(vision_tower) if vision_tower else None,
        tokenizer=str(tokenizer) if tokenizer else None,
        chat_template=chat_template,
    )
    ids, rank = opened.token_ids, find_delta_rank(opened.checkpoint.tensors)
    config = convert_config(
        opened.config,
        opened.tower.config,
        vocab_size=padded_vocab_size(opened.vocab_size, ids.count),
        image_token_id=ids.image,
        video_token_id=ids.video,
        pad_token_id=ids.pad,
        scale_factor=scale_factor,
        delta_rank=rank,
    )
    plan = plan_tensors(opened.checkpoint, opened.tower.checkpoint, config, cast_to)
    config.dtype = plan.tensors[EMBEDDINGS].dtype
    generation_config, dropped = keep_valid_flags(read_optional_json(opened.folder / "generation_config.json"))
    template = opened.chat_template
    fit_generation_config(generation_config, opened.tokenizer, ids, config.text_config, template.text)
    warnings = [f"left out {name}={value}: it has no effect without do_sample" for name, value in dropped.items()]
    warnings += chat_template_warnings(template, opened.tokenizer)
    if opened.config.unknown:
        warnings.append(f"config.json has unknown keys: {', '.join(opened.config.unknown)}")
    base_models = list(base_models) or _base_models(opened)
    new_rows = config.text_config.vocab_size - opened.vocab_size
    card = ModelCard(
        name=repo_id or output.resolve().name,
        config=config,
        vision_tower=opened.tower.name,
        base_models=base_models,
        license=license,
        conversion=(dtype_name(cast_to) if cast_to else None, new_rows, ids.added),
    )
    shards = split_shards(plan.tensors, max_shard_size)

    # The source is hashed while the output is written: both take about as long, and use different threads.
    with ThreadPoolExecutor(1) as pool, output_folder(output, overwrite) as folder:
        hashes = pool.submit(_hash_files, opened.files)
        write_shards(plan.tensors, shards, folder, progress)
        if verify:
            verify_archives(opened.weight_files)
            verify_shards(plan.tensors, folder, verify_progress or progress)
        write_code(folder)
        write_config(config, folder)
        write_processor(config, opened.tower.image_processor, processor_settings(opened.config, config), folder)
        save_tokenizer(opened.tokenizer, folder, opened.config.settings.get("tokenizer_model_max_length"))
        check_token_ids(folder, opened.tokenizer_folder)
        (folder / TEMPLATE_FILE).write_text(template.text, encoding="utf-8")
        generation_config.save_pretrained(folder)
        (folder / "README.md").write_text(card.render(), encoding="utf-8")
        noted = _describe(opened, plan, hashes.result())
        write_json({**noted, "base_models": base_models, "warnings": warnings}, folder / REPORT_FILE)
        check_repo(folder, output.name)
    return ConversionReport(
        output=output,
        weight_files=list(shards),
        num_visual_tokens=config.num_visual_tokens,
        tensors_read=len(opened.checkpoint.tensors) - len(plan.ignored),
        tensors_written=len(plan.tensors),
        ignored=plan.ignored,
        chat_template=template,
        license=card.license_or_inherited,
        base_models=base_models,
        warnings=warnings,
    )


def _cast_to(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise DeltaLlavaError(f"dtype={dtype}: choose from {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def _base_models(source: Source) -> list[str]:
    """Hub ids of the language model and the vision tower, as far as the checkpoint states them."""
    language_model = source.base.name if source.base else source.config.settings.get("_name_or_path")
    ids = (hub_id_of(name, source.folder) for name in (language_model, source.tower.name))
    return [name for name in ids if name is not None]


def _describe(source: Source, plan: TensorPlan, source_hashes: dict[str, str]) -> dict[str, Any]:
    """Where a repo comes from, for its `conversion.json`."""
    tower, base = source.tower, source.base
    return {
        "source": {
            "name": public_name(source.folder),
            "model_type": source.config.settings["model_type"],
            "sha256": source_hashes,
        },
        # No files where the checkpoint holds the tower's weights.
        "vision_tower": {
            "name": tower.name,
            "sha256": _hash_files(tower.checkpoint.files if tower.checkpoint else ()),
        },
        "base_model": {"name": base.name, "sha256": _hash_files(base.checkpoint.files)} if base else None,
        "trained_vocab_size": source.vocab_size,
        "tokens_added": source.token_ids.added,
        "chat_template": source.chat_template.name,
        "chat_template_reason": source.chat_template.reason,
        "tensors": {
            "used": len(source.checkpoint.tensors) - len(plan.ignored),
            "ignored": plan.ignored,
            "written": len(plan.tensors),
            "dtypes": dict(Counter(dtype_name(tensor.dtype) for tensor in plan.tensors.values())),
        },
        "code": describe_code(),
        "versions": {
            "transformers_delta_llava": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _hash_files(files: Iterable[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name; several at a time, since hashing is slower than a disk."""
    with ThreadPoolExecutor(4) as pool:
        files = list(files)
        return dict(zip((file.name for file in files), pool.map(sha256_of, files)))
