"""What a conversion did: the content of a repo's `conversion.json`."""

from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import Field

from .. import __version__
from ..hub.repo_files import IMAGE_TOKEN, describe_code
from ..utils.validation import FileModel
from .tokenizer import PAD_TOKEN


class ReadFiles(FileModel):
    """A folder that was read: a name that may be published, and the sha256 of its files."""

    name: str | None = None
    sha256: dict[str, str] = {}


class ReadCheckpoint(ReadFiles):
    """The source, with its `model_type`."""

    model_type: str | None = None


class TensorReport(FileModel):
    """How many tensors of the source were used, which were ignored and why, and how many were written, by dtype, too."""

    used: int = 0
    ignored: dict[str, str] = {}
    written: int = 0
    dtypes: dict[str, int] = {}


class ConfigKeysReport(FileModel):
    """Keys of the source's config without effect, with the reason, and keys that this package does not know."""

    ignored: dict[str, str] = {}
    unknown: list[str] = []


def _versions() -> dict[str, str]:
    return {
        "transformers_delta_llava": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


class ConversionReport(FileModel):
    """Result of `convert_checkpoint`; without the first three fields the content of `conversion.json`.

    Attributes:
        output: the repo folder.
        weight_files: names of its weight files.
        num_visual_tokens: visual tokens per image by default.
        source: the checkpoint, with every file of it that was read.
        vision_tower: the vision tower; no files where the checkpoint holds its weights.
        base_model: the model that a projector or a LoRA run was trained on; None for a full checkpoint.
        base_models: Hub ids of the language model and the vision tower, as far as the checkpoint states them.
        trained_vocab_size: rows of the source's embeddings; conversion added the rows above them.
        tokens_added: tokens that the source's tokenizer lacked.
        chat_template: name of the chat template, and `chat_template_reason`, why it was chosen.
        tensors: see `TensorReport`.
        config_keys: see `ConfigKeysReport`.
        code: version and hashes of the repo's code.
        versions: of the packages that wrote the repo.
        warnings: sentences worth reading.
    """

    output: Path = Field(Path(), exclude=True)
    weight_files: list[str] = Field([], exclude=True)
    num_visual_tokens: int = Field(0, exclude=True)
    source: ReadCheckpoint = ReadCheckpoint()
    vision_tower: ReadFiles = ReadFiles()
    base_model: ReadFiles | None = None
    base_models: list[str] = []
    trained_vocab_size: int | None = None
    tokens_added: list[str] = [IMAGE_TOKEN, PAD_TOKEN]
    chat_template: str | None = None
    chat_template_reason: str | None = None
    tensors: TensorReport = TensorReport()
    config_keys: ConfigKeysReport = ConfigKeysReport()
    code: dict[str, Any] = Field(default_factory=describe_code)
    versions: dict[str, str] = Field(default_factory=_versions)
    warnings: list[str] = []
