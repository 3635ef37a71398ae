"""What a conversion did, for the caller and for whoever finds the repo later."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from .. import __version__
from .repo_code import describe_code


_CHUNK = 1 << 20
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


def sha256_of(files: list[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name; several at a time, since hashing is slower than a disk."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip((file.name for file in files), pool.map(_sha256, files)))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
