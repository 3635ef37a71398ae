"""Convert a trained checkpoint in the authors' layout to a Hub repo."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..hub.model_card import Conversion, ModelCard
from ..hub.repo_files import check_repo, describe_code, write_code, write_config, write_processor
from ..hub.tokenizer import (
    TOKENIZER_FILES,
    TokenIds,
    add_tokens,
    has_tokenizer,
    load_tokenizer,
    read_own_template,
    save_tokenizer,
)
from ..modeling import DeltaLlavaConfig
from ..modeling.delta_repo_delta_llava import dtype_name
from ..utils.errors import DeltaLlavaError, explain_errors
from ..utils.files import (
    REPORT_FILE,
    atomic_folder,
    check_output,
    hub_id_of,
    public_name,
    read_json,
    sha256_of,
    write_json,
)
from ..utils.validation import DTYPES, torch_dtype
from .chat_templates import ChatTemplate, chat_template_warnings, choose_chat_template, exported_template
from .checkpoint import Checkpoint, Progress, parse_size, verify_archives, verify_shards, write_shards
from .config_mapping import SourceConfig, Vocabulary, convert_config, grown_vocabulary, read_config
from .generation_config import fit_generation_config, read_generation_config
from .sources import BaseModel, open_trained, read_source
from .vision_tower import VisionTower, adapt_to_weights, find_vision_tower, load_vision_tower
from .weight_mapping import (
    EMBEDDINGS,
    SOURCE_EMBEDDINGS,
    TOWER_TARGET,
    NameMap,
    TensorPlan,
    delta_rank,
    describe_other_projector,
    map_names,
    plan_tensors,
)


_THREADS = 4


@dataclass
class ConversionReport:
    """Result of `convert_checkpoint`.

    Attributes:
        output: the repo folder.
        source: name of the checkpoint folder.
        model_type: of the checkpoint.
        source_files: sha256 of every file of the source that was read, by name.
        vision_tower: name of the vision tower.
        vision_tower_files: sha256 of the tower's weight files; empty where the checkpoint brought its tower.
        base_model: name of the model that a projector or a LoRA run was put on; None for a full checkpoint.
        base_model_files: sha256 of that model's weight files.
        trained_vocab_size: rows of the source's embeddings; rows above them were added.
        tokens_added: tokens that the source's tokenizer lacked.
        base_models: Hub ids of what the checkpoint was made of, as far as it says.
        chat_template: name of the chat template, and `chat_template_reason`, why it was taken.
        dtypes: number of tensors written, by dtype.
        tensors_used: number of the source's tensors that were used.
        tensors_ignored: the source's tensors that were left out, with the reason.
        tensors_written: number of tensors in the repo.
        config_keys_ignored: keys of the source's config that have no effect, with the reason.
        config_keys_unknown: keys of the source's config that are not known here.
        visual_tokens: visual tokens per image by default.
        weight_files: names of the weight files.
        warnings: sentences worth reading.
    """

    output: Path
    source: str
    model_type: str
    source_files: dict[str, str]
    vision_tower: str
    vision_tower_files: dict[str, str]
    base_model: str | None
    base_model_files: dict[str, str]
    trained_vocab_size: int
    tokens_added: list[str]
    base_models: list[str]
    chat_template: str
    chat_template_reason: str
    dtypes: dict[str, int]
    tensors_used: int
    tensors_ignored: dict[str, str]
    tensors_written: int
    config_keys_ignored: dict[str, str]
    config_keys_unknown: list[str]
    visual_tokens: int
    weight_files: list[str]
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """What `conversion.json` holds: everything but where the output lies, so that no path is published."""
        return {
            "source": {"name": self.source, "model_type": self.model_type, "sha256": self.source_files},
            "vision_tower": {"name": self.vision_tower, "sha256": self.vision_tower_files},
            "base_model": {"name": self.base_model, "sha256": self.base_model_files} if self.base_model else None,
            "code": describe_code(),
            "trained_vocab_size": self.trained_vocab_size,
            "tokens_added": self.tokens_added,
            "base_models": self.base_models,
            "versions": {
                "transformers_delta_llava": __version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
            "tensors": {
                "used": self.tensors_used,
                "ignored": self.tensors_ignored,
                "written": self.tensors_written,
                "dtypes": self.dtypes,
            },
            "config_keys": {"ignored": self.config_keys_ignored, "unknown": self.config_keys_unknown},
            "chat_template": self.chat_template,
            "chat_template_reason": self.chat_template_reason,
            "warnings": self.warnings,
        }


def hash_files(files: list[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name; several at a time, since hashing is slower than a disk."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip((file.name for file in files), pool.map(sha256_of, files)))


# Tokens of a tokenizer that were not trained, beside those that conversion adds: some authors add a few and never resize.
_MOST_NEW_ROWS = 1024


@dataclass(frozen=True)
class _Source:
    """What was read: the checkpoint and everything it needs from elsewhere."""

    folder: Path
    config: SourceConfig
    checkpoint: Checkpoint
    base: BaseModel | None
    names: NameMap
    tower: VisionTower
    tokenizer: PreTrainedTokenizerBase
    token_ids: TokenIds
    chat_template: ChatTemplate
    untied: bool

    @property
    def rows(self) -> int:
        """Size of the vocabulary that was trained."""
        return self.checkpoint.tensors[SOURCE_EMBEDDINGS].shape[0]

    @property
    def base_models(self) -> list[str]:
        """Hub ids of what the checkpoint was made of, as far as it says."""
        language_model = self.base.name if self.base else self.config.settings.get("_name_or_path")
        ids = [hub_id_of(name, self.folder, self.folder.parent) for name in (language_model, self.tower.name)]
        return [name for name in ids if name is not None]

    @property
    def files(self) -> list[Path]:
        """Files of the checkpoint's folder that a conversion reads."""
        others = ("config.json", "generation_config.json", *TOKENIZER_FILES)
        return [*self.checkpoint.files, *(self.folder / name for name in others if (self.folder / name).is_file())]


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
        progress: called with the bytes of tensors handled so far, and in all; `verify_progress` the same while verifying.
        repo_id: Hub id that the model card's examples name. By default they name the output folder.

    Returns:
        What was done; the same stands in the output's `conversion.json`.

    Raises:
        DeltaLlavaError: one sentence on why there is no output.
        ValueError: from `DeltaLlavaConfig`, on settings that no Delta-LLaVA model can have.
        OSError: reading or writing failed.
    """
    source, output = Path(source), Path(output)
    cast, shard_size = _dtype(dtype), parse_size(max_shard_size)
    if not (source / "config.json").is_file():
        raise DeltaLlavaError(f"The source {source} is not a folder with a config.json.")
    source_config = _read_config(source)
    tower = vision_tower or find_vision_tower(source_config.keys.mm_vision_tower, source)
    inputs = (source, tower, tokenizer or source, base_model or source)
    check_output(output, [Path(path) for path in inputs if Path(path).is_dir()], overwrite)

    read = _read_source(source, source_config, vision_tower, tokenizer, chat_template, base_model)
    ids = read.token_ids
    vocabulary = Vocabulary(grown_vocabulary(read.rows, ids.count), ids.image, ids.pad)
    rank = delta_rank(read.checkpoint.tensors)
    config = convert_config(read.config, read.tower.config, vocabulary, scale_factor=scale_factor, delta_rank=rank)
    plan = plan_tensors(read.checkpoint, read.names, read.tower.checkpoint, config, cast)
    config.dtype = plan.tensors[EMBEDDINGS].dtype

    # Hashes the source while the output is written: both take about as long, and use different threads.
    with ThreadPoolExecutor(1) as pool, atomic_folder(output, overwrite) as folder:
        source_hashes = pool.submit(hash_files, read.files)
        weight_files = write_shards(plan.tensors, folder, shard_size, progress)
        if verify:
            parts = (read.checkpoint, read.tower.checkpoint, read.base.checkpoint if read.base else None)
            verify_archives(file for part in parts if part for file in part.files)
            verify_shards(plan.tensors, folder, verify_progress or progress)
        write_code(folder)
        write_config(config, folder)
        write_processor(config, read.tower.image_processor, read.config.keys.image_aspect_ratio == "pad", folder)
        with explain_errors("The tokenizer cannot be written"):
            save_tokenizer(read.tokenizer, folder, read.config.keys.tokenizer_model_max_length)
        (folder / "chat_template.jinja").write_text(read.chat_template.text, encoding="utf-8")
        warnings = _write_generation_config(read, config, folder)
        (folder / "README.md").write_text(
            _model_card(read, config, repo_id or output.resolve().name, cast), encoding="utf-8"
        )
        report = _report(read, config, plan, output, weight_files, warnings, source_hashes.result())
        write_json(report.to_dict(), folder / REPORT_FILE)
        check_repo(folder, output.name)
    return report


def _read_config(source: Path) -> SourceConfig:
    try:
        return read_config(read_json(source / "config.json"))
    except DeltaLlavaError as error:
        # The tensors tell more about a model of another kind than its config does.
        trained = open_trained(source)
        other = describe_other_projector(trained.tensors, public_name(str(source))) if trained else None
        raise DeltaLlavaError(other or str(error)) from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype
    return torch_dtype(str(dtype))


def _read_source(
    folder: Path,
    config: SourceConfig,
    vision_tower: str | Path | None,
    tokenizer: str | Path | None,
    chat_template: str | None,
    base_model: str | Path | None,
) -> _Source:
    tensors = read_source(folder, str(base_model) if base_model else None, config.text_config)
    checkpoint, base = tensors.checkpoint, tensors.base
    if tensors.untied:
        config = read_config({**config.settings, "tie_word_embeddings": False})
    if other := describe_other_projector(checkpoint.tensors, public_name(str(folder))):
        raise DeltaLlavaError(other)
    names = map_names(checkpoint.tensors)
    if SOURCE_EMBEDDINGS not in checkpoint.tensors:
        raise DeltaLlavaError(f"The checkpoint has no language model in it (no {SOURCE_EMBEDDINGS}).")
    if len(checkpoint.tensors[SOURCE_EMBEDDINGS].shape) != 2:
        raise DeltaLlavaError(f"{SOURCE_EMBEDDINGS} should be a matrix with a row for each token.")
    inner = [name.removeprefix(TOWER_TARGET) for name, _ in names.rules.values() if name.startswith(TOWER_TARGET)]
    spec = str(vision_tower or find_vision_tower(config.keys.mm_vision_tower, folder, with_weights=not inner))
    tower = load_vision_tower(spec, with_weights=not inner)
    adapt_to_weights(tower.config, tower.checkpoint.tensors if tower.checkpoint else inner)
    if tokenizer is None and base is not None and not has_tokenizer(folder):
        tokenizer = base.folder
    if tokenizer is None and not has_tokenizer(folder):
        raise DeltaLlavaError(
            f"{folder.name} brings no tokenizer; pass the folder or Hub id of its language model's with --tokenizer."
        )
    with explain_errors(f"The tokenizer of {public_name(str(tokenizer or folder))} cannot be used"):
        text_tokenizer = load_tokenizer(
            str(tokenizer or folder), config.text_config, config.family.sentencepiece_class
        )
        token_ids = add_tokens(text_tokenizer)
        own_template = read_own_template(str(tokenizer or folder))
    rows = checkpoint.tensors[SOURCE_EMBEDDINGS].shape[0]
    if token_ids.count - rows > _MOST_NEW_ROWS:
        raise DeltaLlavaError(
            f"The tokenizer has ids up to {token_ids.count - 1:,}, but the checkpoint was trained with {rows:,} rows: it is "
            "not the tokenizer of this checkpoint; pass the right one with --tokenizer."
        )
    template = None if chat_template else exported_template(folder, text_tokenizer)
    if template is None:
        template = choose_chat_template(
            chat_template, config.settings, base.name if base else None, text_tokenizer, own_template
        )
    return _Source(
        folder=folder,
        config=config,
        checkpoint=checkpoint,
        base=base,
        names=names,
        tower=tower,
        tokenizer=text_tokenizer,
        token_ids=token_ids,
        untied=tensors.untied,
        chat_template=template,
    )


def _write_generation_config(read: _Source, config: DeltaLlavaConfig, folder: Path) -> list[str]:
    """Write `generation_config.json`; returns what is worth a warning."""
    generation_config, warning = read_generation_config(read.folder)
    fit_generation_config(
        generation_config, read.tokenizer, read.token_ids, config.text_config, read.chat_template.text
    )
    generation_config.save_pretrained(folder)
    return [text for text in (warning, *chat_template_warnings(read.chat_template, read.tokenizer)) if text]


def _model_card(read: _Source, config: DeltaLlavaConfig, name: str, cast: torch.dtype | None) -> str:
    return ModelCard.of(
        config,
        name=name,
        vision_tower=read.tower.name,
        base_models=read.base_models,
        conversion=Conversion(
            cast_to=dtype_name(cast) if cast is not None else None,
            new_rows=config.text_config.vocab_size - read.rows,
            new_tokens=read.token_ids.added,
        ),
    ).render()


def _report(
    read: _Source,
    config: DeltaLlavaConfig,
    plan: TensorPlan,
    output: Path,
    weight_files: list[str],
    warnings: list[str],
    source_files: dict[str, str],
) -> ConversionReport:
    if read.untied:
        warnings = [*warnings, "the adapter has a head or embeddings of its own, so the two are no longer tied"]
    if read.config.unknown:
        warnings = [*warnings, f"config.json has keys that are not known here: {', '.join(read.config.unknown)}"]
    return ConversionReport(
        output=output,
        source=public_name(str(read.folder)),
        model_type=read.config.settings["model_type"],
        source_files=source_files,
        vision_tower=read.tower.name,
        vision_tower_files=hash_files(list(read.tower.checkpoint.files) if read.tower.checkpoint else []),
        base_model=read.base.name if read.base else None,
        base_model_files=hash_files(list(read.base.checkpoint.files)) if read.base else {},
        base_models=read.base_models,
        trained_vocab_size=read.rows,
        tokens_added=read.token_ids.added,
        chat_template=read.chat_template.name,
        chat_template_reason=read.chat_template.reason,
        dtypes=dict(Counter(dtype_name(tensor.dtype) for tensor in plan.tensors.values())),
        tensors_used=len(read.checkpoint.tensors) - len(plan.ignored),
        tensors_ignored=plan.ignored,
        tensors_written=len(plan.tensors),
        config_keys_ignored=read.config.ignored,
        config_keys_unknown=read.config.unknown,
        visual_tokens=config.num_visual_tokens,
        weight_files=weight_files,
        warnings=warnings,
    )
