"""A repo and an image, or one sentence on what is wrong with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..processing.pictures_delta_llava import open_image
from ..utils.errors import DeltaLlavaError, one_line, shorten
from ..utils.files import read_json, refuse_special_files
from ..utils.hub import is_repo_id
from ..utils.templates import render_question
from ..utils.validation import check_sizes


DTYPES = ("float32", "bfloat16", "float16")


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
        DeltaLlavaError: there is no such repo, it is of something else, parts of it are missing, or device or dtype are
            not to be had here.
    """
    if dtype not in DTYPES:
        raise DeltaLlavaError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}.")
    _check_device(device)
    _check_repo(model)
    if Path(model).is_dir() and not (Path(model) / "processor_config.json").is_file():
        raise DeltaLlavaError(f"{model} has no processor: its processor_config.json is missing.")
    with _reading(model):
        loaded, report = DeltaLlavaForConditionalGeneration.from_pretrained(
            model, dtype=getattr(torch, dtype), output_loading_info=True
        )
        processor = DeltaLlavaProcessor.from_pretrained(model)
        render_question(processor, f"The chat template of {model}")
    missing = sorted(report["missing_keys"])
    if missing:
        raise DeltaLlavaError(f"{model} cannot be used: {len(missing)} weights are missing, among them {missing[0]}.")
    return loaded.to(device).eval(), processor


def load_config(model: str) -> DeltaLlavaConfig:
    """
    The configuration of a Delta-LLaVA repo, folder or Hub id.

    Raises:
        DeltaLlavaError: there is no such repo, it is of something else, or its config.json makes no sense.
    """
    _check_repo(model)
    with _reading(model):
        return DeltaLlavaConfig.from_pretrained(model)


def load_picture(image: str) -> Image.Image:
    """
    The image of a file, an `http:`, `https:`, `file:` or `data:` URL, read whole.

    Raises:
        DeltaLlavaError: there is none, it is no image, or the URL does not answer in time.
    """
    if (
        not image[:8].lower().startswith(("http:", "https:", "file:", "data:"))
        and not Path(image).expanduser().exists()
    ):
        raise DeltaLlavaError(f"{shorten(image)}: there is no such image.")
    try:
        picture = open_image(image)
        picture.load()
    except Exception as error:  # whatever Pillow or the network raises
        raise DeltaLlavaError(f"{shorten(image)} is not an image that can be read: {one_line(error, 300)}.") from error
    return picture


@contextmanager
def _reading(model: str) -> Iterator[None]:
    """One sentence of what transformers, safetensors, the tokenizer or the Hub raise on damaged files of `model`."""
    try:
        yield
    except BaseException as error:
        # A panic of the tokenizer's library is no Exception, but leaves the process as it was.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DeltaLlavaError(f"{model} cannot be loaded: {_first_sentence(error)}.") from error


def _first_sentence(error: BaseException) -> str:
    return one_line(str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__, 300)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeltaLlavaError(f"device={device!r} is not to be had here: {_first_sentence(error)}.") from error


def _check_repo(model: str) -> None:
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or not is_repo_id(model):
            raise DeltaLlavaError(f"{shorten(model)} is not a folder, and not a Hub id (owner/name) either.")
        return
    refuse_special_files(folder)
    if not (folder / "config.json").is_file():
        raise DeltaLlavaError(f"{model} is no model: it has no config.json.")
    try:
        settings = read_json(folder / "config.json")
        check_sizes(settings, "config.json")
    except ValueError as error:
        raise DeltaLlavaError(f"{model} is no model: {one_line(error)}.") from error
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        raise DeltaLlavaError(f"{model} is no model: its config.json names no model_type.")
    if model_type != "delta_llava":
        raise DeltaLlavaError(
            f"{model} is a {shorten(model_type)}, not a delta_llava; `delta-llava convert` makes a repo of a checkpoint in "
            "the authors' layout."
        )
