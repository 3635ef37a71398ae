"""Convert a trained checkpoint in the authors' layout to a Hub repo."""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import read_json
from ..hub.model_card import Conversion, ModelCard
from ..hub.repo_files import TEMPLATE_FILE, check_repo, write_code, write_config, write_processor
from ..modeling import DeltaLlavaConfig
from ..modeling.delta_repo_delta_llava import dtype_name
from ..utils.errors import explain_errors
from ..utils.files import REPORT_FILE, atomic_folder, check_output, public_name, sha256_of, write_json
from ..utils.validation import torch_dtype
from .config import Vocabulary, convert_config, padded_vocab_size
from .names import EMBEDDINGS, TensorPlan, find_delta_rank, plan_tensors
from .prompts import chat_template_warnings, fit_generation_config, keep_valid_flags
from .report import ConfigKeysReport, ConversionReport, ReadCheckpoint, ReadFiles, TensorReport
from .sources import Source, read_source, read_source_config
from .tokenizer import save_tokenizer
from .vision_tower import find_vision_tower
from .weights import Progress, split_shards, verify_archives, verify_shards, write_shards


_THREADS = 4


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
) -> ConversionReport:
    """Convert a checkpoint into a folder that loads with `trust_remote_code` where this package is not installed.

    The output appears complete or not at all. The source is only read, and no code from it is run. Tensors stay as they
    are, bit for bit, unless `dtype` asks otherwise; the embeddings get rows for new tokens.

    Args:
        source: folder with `config.json` and weights: a full checkpoint (safetensors, `.bin` or `.pt`), with or without
            the vision tower's; a projector alone (`mm_projector.bin`); or a LoRA run (`adapter_model.*` with
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

    Returns:
        What was done, as in the output's `conversion.json`.

    Raises:
        DeltaLlavaError: one sentence on why there is no output.
        ValueError: from `DeltaLlavaConfig`, on settings that no Delta-LLaVA model can have.
        OSError: reading or writing failed.
    """
    folder, output = Path(source), Path(output)
    cast_to = None if dtype is None else torch_dtype(dtype if isinstance(dtype, str) else dtype_name(dtype))
    source_config = read_source_config(folder)
    tower = vision_tower or find_vision_tower(source_config.keys.mm_vision_tower, folder)
    inputs = [Path(path) for path in (folder, tower, tokenizer, base_model) if path]
    check_output(output, [path for path in inputs if path.is_dir()], overwrite)

    opened = read_source(
        folder,
        source_config,
        base_model=str(base_model) if base_model else None,
        vision_tower=str(vision_tower) if vision_tower else None,
        tokenizer=str(tokenizer) if tokenizer else None,
        chat_template=chat_template,
    )
    config = _plan_config(opened, scale_factor)
    plan = plan_tensors(opened.checkpoint, opened.tower.checkpoint, config, cast_to)
    config.dtype = plan.tensors[EMBEDDINGS].dtype
    generation_config, warnings = _plan_generation(opened, config)
    shards = split_shards(plan.tensors, max_shard_size)

    # The source is hashed while the output is written: both take about as long, and use different threads.
    with ThreadPoolExecutor(1) as pool, atomic_folder(output, overwrite) as tmp_dir:
        hashes = pool.submit(hash_files, opened.files)
        write_shards(plan.tensors, shards, tmp_dir, progress)
        if verify:
            verify_archives(opened.weight_files)
            verify_shards(plan.tensors, tmp_dir, verify_progress or progress)
        write_code(tmp_dir)
        write_config(config, tmp_dir)
        write_processor(config, opened.tower.image_processor, opened.config.keys.image_aspect_ratio == "pad", tmp_dir)
        with explain_errors("The tokenizer cannot be written"):
            save_tokenizer(opened.tokenizer, tmp_dir, opened.config.keys.tokenizer_model_max_length)
        (tmp_dir / TEMPLATE_FILE).write_text(opened.chat_template.text, encoding="utf-8")
        generation_config.save_pretrained(tmp_dir)
        card = _model_card(opened, config, repo_id or output.resolve().name, cast_to)
        (tmp_dir / "README.md").write_text(card.render(), encoding="utf-8")
        report = _report(
            opened,
            plan,
            hashes.result(),
            output=output,
            weight_files=list(shards),
            num_visual_tokens=config.num_visual_tokens,
            warnings=warnings,
        )
        write_json(report.model_dump(), tmp_dir / REPORT_FILE)
        check_repo(tmp_dir, output.name)
    return report


def hash_files(files: Iterable[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name; several at a time, since hashing is slower than a disk."""
    files = list(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip((file.name for file in files), pool.map(sha256_of, files)))


def _plan_config(source: Source, scale_factor: int | None) -> DeltaLlavaConfig:
    ids = source.token_ids
    vocabulary = Vocabulary(padded_vocab_size(source.vocab_size, ids.count), ids.image, ids.pad)
    rank = find_delta_rank(source.checkpoint.tensors)
    return convert_config(source.config, source.tower.config, vocabulary, scale_factor=scale_factor, delta_rank=rank)


def _plan_generation(source: Source, config: DeltaLlavaConfig) -> tuple[GenerationConfig, list[str]]:
    """The generation settings, and everything about the source that is worth a warning."""
    path = source.folder / "generation_config.json"
    generation_config, dropped = keep_valid_flags(read_json(path) if path.is_file() else {})
    fit_generation_config(
        generation_config, source.tokenizer, source.token_ids, config.text_config, source.chat_template.text
    )
    warnings = [f"left out {name}={value}: it has no effect without do_sample" for name, value in dropped.items()]
    warnings += chat_template_warnings(source.chat_template, source.tokenizer)
    if source.untied:
        warnings.append("the adapter has a head or embeddings of its own, so the two are no longer tied")
    if source.config.unknown:
        warnings.append(f"config.json has unknown keys: {', '.join(source.config.unknown)}")
    return generation_config, warnings


def _model_card(source: Source, config: DeltaLlavaConfig, name: str, cast_to: torch.dtype | None) -> ModelCard:
    return ModelCard.from_config(
        config,
        name=name,
        vision_tower=source.tower.name,
        base_models=source.base_models,
        conversion=Conversion(
            cast_to=dtype_name(cast_to) if cast_to is not None else None,
            new_rows=config.text_config.vocab_size - source.vocab_size,
            new_tokens=source.token_ids.added,
        ),
    )


def _report(source: Source, plan: TensorPlan, source_hashes: dict[str, str], **results: Any) -> ConversionReport:
    tower, base = source.tower, source.base
    return ConversionReport(
        source=ReadCheckpoint(
            name=public_name(str(source.folder)),
            model_type=source.config.settings["model_type"],
            sha256=source_hashes,
        ),
        vision_tower=ReadFiles(name=tower.name, sha256=hash_files(tower.checkpoint.files if tower.checkpoint else [])),
        base_model=ReadFiles(name=base.name, sha256=hash_files(base.checkpoint.files)) if base else None,
        base_models=source.base_models,
        trained_vocab_size=source.vocab_size,
        tokens_added=source.token_ids.added,
        chat_template=source.chat_template.name,
        chat_template_reason=source.chat_template.reason,
        tensors=TensorReport(
            used=len(source.checkpoint.tensors) - len(plan.ignored),
            ignored=plan.ignored,
            written=len(plan.tensors),
            dtypes=dict(Counter(dtype_name(tensor.dtype) for tensor in plan.tensors.values())),
        ),
        config_keys=ConfigKeysReport(ignored=source.config.ignored, unknown=source.config.unknown),
        **results,
    )
