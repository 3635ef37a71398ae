"""A repo and a picture, or one sentence on what is wrong with them."""

import json
import re
from pathlib import Path

import torch
from PIL import Image
from transformers.image_utils import load_image

from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor


DTYPES = ("float32", "bfloat16", "float16")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADDRESS = re.compile(r"https?://|data:")


def load_repo(
    model: str, device: str = "cpu", dtype: str = "float32"
) -> tuple[DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor]:
    """
    Model, in evaluation mode, and processor of a Delta-LLaVA repo.

    Args:
        model: folder or Hub id.
        device: a device of torch.
        dtype: one of `DTYPES`.

    Raises:
        ValueError: there is no such repo, it is of something else, parts of it are missing, or device or dtype are
            not to be had here.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}.")
    _check_device(device)
    _check_repo(model)
    try:
        loaded, report = DeltaLlavaForConditionalGeneration.from_pretrained(
            model, dtype=getattr(torch, dtype), output_loading_info=True
        )
        processor = DeltaLlavaProcessor.from_pretrained(model)
    except Exception as error:  # what transformers, safetensors, the tokenizer or the Hub raise on damaged files
        raise ValueError(f"{model} cannot be loaded: {_first_sentence(error)}.") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{model} cannot be used: {len(missing)} weights are missing, among them {missing[0]}.")
    return loaded.to(device).eval(), processor


def load_picture(image: str) -> Image.Image:
    """
    The picture of a file, a URL or a data URI, read whole.

    Raises:
        ValueError: there is none, or it is no picture.
    """
    if not _ADDRESS.match(image) and not Path(image).is_file():
        raise ValueError(f"{image}: there is no such picture.")
    try:
        picture = load_image(image) if _ADDRESS.match(image) else Image.open(image)
        picture.load()
    except Exception as error:  # whatever Pillow or the network raises
        raise ValueError(f"{image[:200]} is not a picture that can be read: {_first_sentence(error)}.") from error
    return picture


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device!r} is not to be had here: {_first_sentence(error)}.") from error


def _check_repo(model: str) -> None:
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or not _REPO_ID.fullmatch(model):
            raise ValueError(f"{model} is not a folder, and not a Hub id (owner/name) either.")
        return
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = settings["model_type"]
    except FileNotFoundError as error:
        raise ValueError(f"{model} is no model: it has no config.json.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{model} is no model: its config.json names no model_type.") from error
    if model_type != "delta_llava":
        raise ValueError(
            f"{model} is a {model_type}, not a delta_llava; `delta-llava convert` makes a repo of a checkpoint in the "
            "authors' layout."
        )
    if not (folder / "processor_config.json").is_file():
        raise ValueError(f"{model} has no processor: its processor_config.json is missing.")


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")[:300]
