"""Whether a folder is a repo that loads, checked before it is published."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from PIL import Image
from transformers.utils import logging

from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.errors import explain_errors
from ..utils.files import read_json, refuse_special_files
from ..utils.templates import render_question
from ..utils.validation import check_sizes
from .errors import ConversionError, listed
from .repo_code import HUB_FILES, read_code


# What a model repo has, beside this package's code. Logs, data, keys and whatever else lies in the folder stay there.
PUBLISHED = (
    *("README.md", "LICENSE*", "NOTICE*", ".gitattributes"),
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("model*.safetensors", "model*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("conversion.json", "recipe.yaml", "delta_config.json", "deltas.safetensors"),
)
# Files that run code when they are loaded; safetensors hold the weights.
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
# What login tokens of the Hub look like.
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_LARGEST_TEXT = 10 * 2**20


def repo_files(folder: Path, include: Sequence[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """The files to publish, by their path in the repo, and the names of those that stay.

    Args:
        folder: the repo.
        include: shell patterns of files to publish beside those that a model repo has.

    Raises:
        ConversionError: `folder` is none, lacks this package's code, or has other code under its names; a pattern without
            a file, or with a pickle; a link among the files, or a login token in one.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder} is not a folder.")
    files, left_out, matched = {}, [], set()
    refuse_special_files(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() and not path.is_symlink():
            continue
        if any(part.startswith(".") for part in name.parts) and str(name) not in PUBLISHED:
            continue  # nobody looks for `.git` and `.env` in a repo
        asked = {pattern for pattern in include if fnmatch(name.as_posix(), pattern)}
        matched |= asked
        if asked or name.as_posix() in HUB_FILES or any(fnmatch(name.as_posix(), pattern) for pattern in PUBLISHED):
            files[name.as_posix()] = path
        else:
            left_out.append(name.as_posix())
    if unmatched := set(include) - matched:
        raise ConversionError(f"--include {listed(unmatched)} matches no file in {folder.name} that can be published.")
    _refuse("links, which the Hub would get as files", (name for name, path in files.items() if path.is_symlink()))
    _refuse("pickles, which nobody should load", (name for name in files if Path(name).suffix.lower() in PICKLES))
    _check_code(folder)
    _refuse("login tokens of the Hub", (name for name, path in files.items() if _holds_token(path)))
    return files, left_out


def check_repo(folder: Path, name: str | None = None) -> None:
    """Load `folder` as its users will, without reading the weights' values and without running code of the folder.

    The model is built on the meta device, so a repo of any size is checked in seconds: every weight must be there, in
    its shape, and no other; the processor must answer a chat about an image with the model's number of placeholders.

    Args:
        folder: the repo.
        name: what errors call it; by default the folder's name.

    Raises:
        ConversionError: one sentence on what does not load.
    """
    name = name or folder.name
    refuse_special_files(folder)
    with explain_errors(f"{name} does not load"):
        check_sizes(read_json(folder / "config.json"), f"config.json of {name}")
        config = DeltaLlavaConfig.from_pretrained(folder)
        _check_weights(folder, name)
        _check_processor(folder, name, config)


def _check_code(folder: Path) -> None:
    code = read_code(folder)
    if code.missing:
        raise ConversionError(
            f"The folder lacks {listed(code.missing)}, without which it does not load; convert or save the model again."
        )
    _refuse("older code of this package (update it first)", code.outdated)
    _refuse("code that somebody changed (save the model again, or update it with force)", code.edited)


def _holds_token(path: Path) -> bool:
    return path.stat().st_size <= _LARGEST_TEXT and _TOKEN.search(path.read_bytes()) is not None


def _check_weights(folder: Path, name: str) -> None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is one table, ours one sentence
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        _, info = DeltaLlavaForConditionalGeneration.from_pretrained(
            folder, device_map="meta", use_safetensors=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = listed((name if isinstance(name, str) else name[0] for name in info[kind]), limit=5)
            raise ConversionError(f"{name} does not load: its weights have {kind.replace('_', ' ')} ({names}).")


def _check_processor(folder: Path, name: str, config: DeltaLlavaConfig) -> None:
    """Ask about an image, as every chat does."""
    processor = DeltaLlavaProcessor.from_pretrained(folder)
    words_by_id: dict[int, str] = {}
    for word, token_id in processor.tokenizer.get_vocab().items():
        if (other := words_by_id.setdefault(token_id, word)) != word:
            raise ConversionError(f"{name} does not load: its tokenizer has {listed((other, word))} under one id.")
    prompt = render_question(processor, f"The chat template of {name}")
    inputs = processor(images=Image.new("RGB", (40, 30)), text=prompt, return_tensors="pt")
    found = int((inputs["input_ids"] == config.image_token_id).sum())
    if found != config.num_visual_tokens:
        raise ConversionError(
            f"{name} does not load: its processor writes {found} placeholders for an image, its model wants "
            f"{config.num_visual_tokens}."
        )
    if not inputs["pixel_values"].isfinite().all():
        raise ConversionError(f"{name} does not load: its image processor turns an image into NaN or Inf.")


def _refuse(what: str, names: object) -> None:
    found = [str(name) for name in names]  # type: ignore[attr-defined]
    if found:
        raise ConversionError(f"The folder holds {what}: {listed(found, limit=5)}.")
