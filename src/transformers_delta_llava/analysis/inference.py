"""Load a repo and an image, ask a question, or raise one sentence on what is wrong."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..processing.image_utils_delta_llava import open_image
from ..utils.errors import DeltaLlavaError, one_line, shorten
from ..utils.files import is_repo_id, read_json, refuse_special_files
from ..utils.prompts import check_prompt, check_texts
from ..utils.templates import render_question
from ..utils.validation import check_sizes, torch_dtype


def load_repo(
    model: str, device: str = "cpu", dtype: str = "float32"
) -> tuple[DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor]:
    """
    Model, in evaluation mode, and processor of a Delta-LLaVA repo.

    Args:
        model: folder or Hub id.
        device: a device of torch.
        dtype: float32, bfloat16 or float16.

    Raises:
        DeltaLlavaError: there is no such repo, it holds another model, parts of it are missing, or the device or
            the dtype cannot be used.
    """
    weights_dtype = torch_dtype(dtype)
    _check_device(device)
    _check_repo(model)
    if Path(model).is_dir() and not (Path(model) / "processor_config.json").is_file():
        raise DeltaLlavaError(f"{model} has no processor: its processor_config.json is missing.")
    with _reading(model):
        loaded, report = DeltaLlavaForConditionalGeneration.from_pretrained(
            model, dtype=weights_dtype, output_loading_info=True
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
        DeltaLlavaError: there is no such repo, it holds another model, or its config.json is invalid.
    """
    _check_repo(model)
    with _reading(model):
        return DeltaLlavaConfig.from_pretrained(model)


def load_image(image: str) -> Image.Image:
    """
    The image of a file, an `http:`, `https:`, `file:` or `data:` URL, read whole.

    Raises:
        DeltaLlavaError: there is none, it is not an image, or the URL does not answer in time.
    """
    if (
        not image[:8].lower().startswith(("http:", "https:", "file:", "data:"))
        and not Path(image).expanduser().exists()
    ):
        raise DeltaLlavaError(f"{shorten(image)}: there is no such image.")
    try:
        loaded = open_image(image)
        loaded.load()
    except Exception as error:  # whatever Pillow or the network raises
        raise DeltaLlavaError(f"{shorten(image)} is not an image that can be read: {one_line(error, 300)}.") from error
    return loaded


@contextmanager
def _reading(model: str) -> Iterator[None]:
    """One sentence of what transformers, safetensors, the tokenizer or the Hub raise on damaged files of `model`."""
    try:
        yield
    except BaseException as error:
        # A panic of the tokenizer's library is not an Exception, but leaves the process as it was.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DeltaLlavaError(f"{model} cannot be loaded: {_first_sentence(error)}.") from error


def _first_sentence(error: BaseException) -> str:
    return one_line(str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__, 300)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeltaLlavaError(f"device={device!r} cannot be used: {_first_sentence(error)}.") from error


def _read_settings(model: str) -> Mapping[str, Any]:
    """What stands in the config.json of a folder or Hub id."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or not is_repo_id(model):
            raise DeltaLlavaError(f"{shorten(model)} is not a folder, and not a Hub id (owner/name) either.")
        with _reading(model):
            return DeltaLlavaConfig.get_config_dict(model)[0]
    refuse_special_files(folder)
    if not (folder / "config.json").is_file():
        raise DeltaLlavaError(f"{model} is not a model: it has no config.json.")
    try:
        return read_json(folder / "config.json")
    except ValueError as error:
        raise DeltaLlavaError(f"{model} is not a model: {one_line(error)}.") from error


def _check_repo(model: str) -> None:
    settings = _read_settings(model)
    try:
        check_sizes(settings, "config.json")
    except ValueError as error:
        raise DeltaLlavaError(f"{model} is not a model: {one_line(error)}.") from error
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        raise DeltaLlavaError(f"{model} is not a model: its config.json names no model_type.")
    if model_type != "delta_llava":
        raise DeltaLlavaError(
            f"{model} is a {shorten(model_type)}, not a delta_llava; `delta-llava convert` makes a repo of a checkpoint in "
            "the authors' layout."
        )


def encode_question(
    processor: DeltaLlavaProcessor,
    image: Image.Image | None,
    prompt: str,
    num_visual_tokens: int | str | None = None,
    auto_max_loss: float | None = None,
    max_tokens: int | None = None,
) -> Any:
    """
    Inputs, a batch of one, of one turn in the processor's chat template: the image, then the prompt.

    Args:
        processor: of any repo.
        image: any image; `None` for a question in words alone.
        prompt: what to ask.
        num_visual_tokens: a budget or `"auto"`; the processor's default when `None`.
        auto_max_loss: what `"auto"` may lose; the processor's default when `None`.
        max_tokens: of the prompt with its visual tokens, from `max_prompt_tokens`; any number when `None`.

    Raises:
        ValueError: a budget that the processor does not have, an image that cannot be used, or a prompt that is longer.
    """
    check_texts([prompt], processor.tokenizer, max_tokens)
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    content.append({"type": "text", "text": prompt})
    options = {"num_visual_tokens": num_visual_tokens, "auto_max_loss": auto_max_loss, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs=options,
    )
    check_prompt(inputs["input_ids"].shape[1], max_tokens)
    return inputs


def count_visual_tokens(processor: DeltaLlavaProcessor, inputs: Any) -> int:
    """Visual tokens of the one image in `inputs`."""
    return int((inputs["input_ids"] == processor.image_token_id).sum())


def find_token(processor: DeltaLlavaProcessor, ids: Sequence[int], token: int | str, num_visual_tokens: int) -> int:
    """
    Position among the `ids` of an answer with `num_visual_tokens`: `token` itself, or where its text starts.

    Raises:
        ValueError: the answer is empty, or has no such token.
    """
    if not ids:
        raise ValueError(f"The answer with {num_visual_tokens} visual tokens is empty: there is no token to explain.")
    if isinstance(token, int) and 0 <= token < len(ids):
        return token
    if isinstance(token, str):
        wanted = token.strip()
        for start in range(len(ids)):
            text = token_text(processor, ids[start : start + 1])
            # A word may be in several tokens, and so may a character: its parts decode to U+FFFD.
            for stop in range(start + 2, len(ids) + 1):
                if not text or text == wanted or len(text.rstrip("\ufffd")) > len(wanted):
                    break
                text = token_text(processor, ids[start:stop])
            if text and text == wanted:
                return start
    pieces = ", ".join(f"{index} {token_text(processor, [token_id])!r}" for index, token_id in enumerate(ids[:20]))
    more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
    raise ValueError(
        f"token={token!r}: the answer with {num_visual_tokens} visual tokens does not have it; its tokens are {pieces}{more}."
    )


def token_text(processor: DeltaLlavaProcessor, ids: Sequence[int]) -> str:
    """Text of ids, special tokens among them, stripped."""
    return str(processor.decode(list(ids))).strip()


@torch.no_grad()
def answer_ids(model: DeltaLlavaForConditionalGeneration, inputs: Any, max_new_tokens: int) -> list[int]:
    """Ids of the greedy answer to the inputs of one question, up to the token that ends it."""
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=False
    )
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return list(takewhile(lambda index: index not in ends, output[0, inputs["input_ids"].shape[1] :].tolist()))
