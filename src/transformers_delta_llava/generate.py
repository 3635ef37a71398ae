"""Greedy answers for one image, a folder of images or a JSONL file, at one number of visual tokens or several."""

import json
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from glob import glob
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.image_utils import load_image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .errors import DeltaLlavaError, one_line
from .modeling import DeltaLlavaForConditionalGeneration
from .modeling.modeling_delta_llava import PatchFeatures
from .processing import DeltaLlavaProcessor


MAX_NEW_TOKENS = 128
IMAGE_SUFFIXES = set(Image.registered_extensions())
# Requests are sorted by length within windows of so many batches; images that a window shares are encoded once.
WINDOW = 8
# Of a body in OpenAI's batch format: anything else would be ignored, so it is refused.
BODY_KEYS = {"model", "messages", "max_tokens", "max_completion_tokens", "mm_processor_kwargs", "temperature", "seed"}
Number: TypeAlias = int | str | list[int | str] | None


@dataclass(frozen=True)
class Request:
    """
    One question.

    Attributes:
        id: name of the request, unique within a file.
        messages: chat; image parts are `{"type": "image", "url": ...}` with a path, a URL, base64 or a PIL image.
        num_visual_tokens: a number, `"auto"`, or one of these per image; the processor's default when `None`.
        max_tiles: most tiles of an image; the processor's default when `None`.
        answer: right answers, where they are known.
        max_new_tokens: length of the longest answer.
        error: why the request cannot be answered.
    """

    id: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    num_visual_tokens: Number = None
    max_tiles: int | None = None
    answer: tuple[str, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    error: str | None = None

    @property
    def key(self) -> str:
        """Names the request at its number of visual tokens."""
        return json.dumps([self.id, self.num_visual_tokens])

    def parts(self) -> list[dict[str, Any]]:
        """The parts of all turns; a turn of text alone is one."""
        contents = (turn["content"] for turn in self.messages)
        return sum(([{"type": "text", "text": c}] if isinstance(c, str) else c for c in contents), [])

    def images(self) -> list[Any]:
        """The images, in order."""
        return [part["url"] for part in self.parts() if part["type"] == "image"]

    def text_length(self) -> int:
        """Characters of all turns."""
        return sum(len(part.get("text", "")) for part in self.parts())


@dataclass(frozen=True)
class Answer:
    """The text that answers a request, or the error instead; `visual_tokens` are those of all its images."""

    request: Request
    text: str = ""
    visual_tokens: int = 0
    error: str | None = None


def words(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation at their ends."""
    stripped = (word.strip(".,;:!?\"'()") for word in text.lower().split())
    return [word for word in stripped if word]


def ask(prompt: str, *images: Any) -> list[dict[str, Any]]:
    """Messages of one user turn: the images, then the prompt."""
    parts = [{"type": "image", "url": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def read_requests(source: str, prompt: str | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> list[Request]:
    """
    The requests of a JSONL file, or `prompt` about every image of a folder or a glob pattern, or about one image.

    A line is OpenAI's batch format (`custom_id`, `body`), or `{"image" or "images", "prompt"}` with, optionally, `id`,
    `num_visual_tokens`, `max_tiles` and `answer` (a text or several); image paths are relative to the file.

    Raises:
        DeltaLlavaError: there is no input, or no prompt for images.
        OSError: the file cannot be read.
    """
    path = Path(source)
    if path.suffix == ".jsonl":
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [_read_row(line, number, path.parent, max_new_tokens) for number, line in enumerate(lines)]
    if prompt is None:
        raise DeltaLlavaError(f"{source} is not a .jsonl file; give a prompt for its images")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        named = {file.relative_to(path).as_posix(): str(file) for file in files}
    elif any(character in source for character in "*?[") and not path.exists():
        named = {file: file for file in sorted(glob(source, recursive=True))}
    else:
        named = {source: source}
    if not named:
        raise DeltaLlavaError(f"{source} has no images")
    return [Request(name, ask(prompt, file), max_new_tokens=max_new_tokens) for name, file in named.items()]


def _read_row(line: str, number: int, folder: Path, max_new_tokens: int) -> Request:
    row: dict[str, Any] = {}
    try:
        row = json.loads(line)
        if "body" in row:
            return _read_body(row["custom_id"], row["body"], max_new_tokens)
        images = row.get("images", [row["image"]] if "image" in row else [])
        images = [image if "://" in image or image.startswith("data:") else str(folder / image) for image in images]
        answer = row.get("answer", ())
        return Request(
            str(row.get("id", number)),
            ask(row["prompt"], *images),
            row.get("num_visual_tokens"),
            row.get("max_tiles"),
            (answer,) if isinstance(answer, str) else tuple(answer),
            max_new_tokens,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        name = row.get("custom_id", row.get("id", number)) if isinstance(row, dict) else number
        return Request(str(name), error=f"line {number + 1}: {type(error).__name__}: {one_line(error)}")


def _read_body(custom_id: str, body: dict[str, Any], max_new_tokens: int) -> Request:
    if ignored := [name for name, value in body.items() if name not in BODY_KEYS and value is not None]:
        raise ValueError(f"{', '.join(ignored)} is not supported")
    if body.get("temperature"):
        raise ValueError(f"temperature={body['temperature']} is not supported: answers are greedy")
    messages = [{**turn, "content": _read_content(turn["content"])} for turn in body["messages"]]
    options = {"num_visual_tokens": None, "max_tiles": None, **(body.get("mm_processor_kwargs") or {})}
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or max_new_tokens
    return Request(custom_id, messages, max_new_tokens=limit, **options)


def _read_content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "image", "url": part["image_url"]["url"]} if part["type"] == "image_url" else part for part in content
    ]


def at_budgets(requests: Iterable[Request], numbers: Sequence[Number]) -> list[Request]:
    """Every request at every one of `numbers`; as it is where there are none."""
    return [replace(r, num_visual_tokens=number) for r in requests for number in numbers] if numbers else [*requests]


def generate(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    requests: Sequence[Request],
    batch_size: int = 16,
    num_workers: int = 0,
    done: Collection[str] = (),
) -> Iterator[tuple[list[Answer], float]]:
    """
    Answer `requests` greedily, batch by batch.

    Batches do not depend on `done`, so a run that goes on gives the answers of one that was never interrupted. The vision
    tower runs once for an image that several requests in a window share.

    Args:
        model: in evaluation mode, on any device.
        processor: of the same repo.
        requests: in any order; requests about one image should be neighbours.
        batch_size: requests at a time.
        num_workers: processes that read and encode images ahead of the model; 0 does it in this one.
        done: keys of requests that are answered already.

    Yields:
        Answers of a batch, in any order, and the seconds that the model took.
    """
    batches: list[list[Request]] = []
    needed: list[set[str]] = []  # after each batch, the images that later ones of its window show
    for start in range(0, len(requests), WINDOW * batch_size):
        window = _batches(requests[start : start + WINDOW * batch_size], batch_size)
        window = [batch for batch in window if any(request.key not in done for request in batch)]
        batches += window
        needed += [set(_image_names(sum(window[index:], []))) for index in range(1, len(window) + 1)]
    loader: Any = DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=partial(_encode, processor),
    )
    features = _Features(model)
    for (good, inputs, failed), names in zip(loader, needed):
        begin = time.perf_counter()
        answers = failed + (_answer(model, processor, features, good, inputs) if good else [])
        features.forget_others(names)
        yield [answer for answer in answers if answer.request.key not in done], time.perf_counter() - begin


def _batches(window: Iterable[Request], size: int) -> list[list[Request]]:
    """Requests with the same options, sorted by length, in batches of at most `size`."""
    groups: dict[tuple, list[Request]] = {}
    for request in sorted(window, key=lambda request: (len(request.images()), request.text_length())):
        options = request.max_new_tokens, str(request.num_visual_tokens), request.max_tiles
        groups.setdefault(options, []).append(request)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _image_names(requests: Iterable[Request]) -> list[str]:
    return [str(image) for request in requests for image in request.images()]


def _encode(processor: DeltaLlavaProcessor, batch: list[Request]) -> tuple[list[Request], Any, list[Answer]]:
    """In a worker: the requests that can be answered, the processor's output for them, and errors for the others."""
    good: list[Request] = []
    chats, failed = [], []
    for request in batch:
        try:
            if request.error is not None:
                raise DeltaLlavaError(request.error)
            chat = _with_images(request.messages)
            processor.apply_chat_template([chat], add_generation_prompt=True)
            processor.resolve_num_visual_tokens(request.num_visual_tokens, len(request.images()))
        except Exception as error:  # noqa: PERF203  # whatever Pillow, the network or the template raises
            failed.append(Answer(request, error=f"{type(error).__name__}: {one_line(error, 300)}"))
        else:
            good.append(request)
            chats.append(chat)
    if not good:
        return [], None, failed
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    numbers = [_as_list(request.num_visual_tokens, len(request.images())) for request in good]
    if good[0].num_visual_tokens is not None and any(numbers):
        options["num_visual_tokens"] = sum(numbers, [])
    if good[0].max_tiles is not None:
        options["max_tiles"] = good[0].max_tiles
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=options
    )
    return good, inputs, failed


def _as_list(number: Number, count: int) -> list[Any]:
    return number if isinstance(number, list) else [number] * count


def _with_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**turn, "content": [_with_image(part) for part in turn["content"]]}
        if isinstance(turn["content"], list)
        else turn
        for turn in messages
    ]


def _with_image(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    image = part["url"]
    return {"type": "image", "image": _load(image.removeprefix("file://")) if isinstance(image, str) else image}


# Requests about one image are neighbours.
_load = lru_cache(maxsize=64)(load_image)


class _Features:
    """Patch features of images, by name, until they are forgotten."""

    def __init__(self, model: DeltaLlavaForConditionalGeneration):
        self.model = model
        self.kept: dict[str, tuple[torch.Tensor, ...]] = {}

    def __call__(self, images: list[str], pixel_values: torch.Tensor) -> PatchFeatures:
        """Features of `images`; the tower runs on those that it has not seen."""
        new = {image: index for index, image in enumerate(images) if image not in self.kept}
        if new:
            pixels = pixel_values[list(new.values())].to(self.model.device, self.model.dtype)
            features = self.model.model.get_patch_features(pixels)
            self.kept |= dict(zip(new, zip(features.stream, *features.levels)))
        stream, *levels = (torch.stack(states) for states in zip(*(self.kept[image] for image in images)))
        return PatchFeatures(stream, levels, BaseModelOutputWithPooling())

    def forget_others(self, images: set[str]) -> None:
        """Keep those of `images` only; a copy, since a batch is one tensor of which each image is a part."""
        self.kept = {name: tuple(map(torch.clone, states)) for name, states in self.kept.items() if name in images}


@torch.inference_mode()
def _answer(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    features: _Features,
    requests: list[Request],
    inputs: Any,
) -> list[Answer]:
    encoded: dict[str, Any] = {}
    if "image_grid_thw" in inputs:  # tiles differ from request to request
        names = ("pixel_values", "num_visual_tokens", "image_grid_thw")
        encoded = {name: x for name, x in inputs.to(model.device, model.dtype).items() if name in names}
    elif "pixel_values" in inputs:
        images = _image_names(requests)
        numbers = inputs.get("num_visual_tokens", [processor.image_seq_length] * len(images))
        tokens = model.model.project_features(features(images, inputs["pixel_values"]), [int(n) for n in numbers])
        encoded = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tokens)}}
    output = model.generate(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=requests[0].max_new_tokens,
        do_sample=False,
        **encoded,
    )
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    counts = (inputs["input_ids"] == processor.image_token_id).sum(-1).tolist()
    return [Answer(request, text.strip(), count) for request, text, count in zip(requests, texts, counts)]


class AnswerFile:
    """
    Answers in a JSONL file, each written once, so that a run that was killed can go on.

    Requests of a file in OpenAI's batch format are answered in it, as `vllm run-batch` does; others by
    `{"id", "num_visual_tokens", "text"}` or `{"id", "num_visual_tokens", "error"}`.
    """

    def __init__(self, path: Path, batch_format: bool = False):
        self.path, self.batch_format = path, batch_format

    def read(self) -> dict[str, Answer]:
        """The answers by the key of their request; a line that was cut off by a kill is removed."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self.path.write_bytes(whole)
        answers = {}
        for row in map(json.loads, whole.splitlines()):
            request = Request(row["custom_id"] if self.batch_format else row["id"], [], row["num_visual_tokens"])
            body = (row["response"] or {}).get("body", {}) if self.batch_format else row
            text = body["choices"][0]["message"]["content"] if "choices" in body else body.get("text", "")
            answers[request.key] = Answer(request, text, row["visual_tokens"], row.get("error"))
        return answers

    def append(self, answers: Iterable[Answer]) -> None:
        """Write one line per answer."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(json.dumps(self._row(answer), ensure_ascii=False) + "\n" for answer in answers))

    def _row(self, answer: Answer) -> dict[str, Any]:
        id, number = answer.request.id, answer.request.num_visual_tokens
        row = {"id": id, "num_visual_tokens": number, "visual_tokens": answer.visual_tokens}
        if not self.batch_format:
            return {**row, **({"text": answer.text} if answer.error is None else {"error": answer.error})}
        row["custom_id"] = id
        if answer.error is not None:
            return {**row, "response": None, "error": {"message": answer.error, "code": 400}}
        message = {"role": "assistant", "content": answer.text}
        body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        return {**row, "response": {"status_code": 200, "request_id": id, "body": body}, "error": None}


def compare(
    requests: Iterable[Request], answers: Mapping[str, Answer], seconds: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """
    Accuracy, time and visual tokens at each number of visual tokens.

    Args:
        requests: those without a right answer are left out.
        answers: by the key of their request.
        seconds: that the model took, by number of visual tokens as text.

    Returns:
        Rows of `num_visual_tokens`, `questions`, `accuracy` and `interval_95` in percent, `visual_tokens` per question, `seconds`.
    """
    rows = []
    known = [request for request in requests if request.answer and request.key in answers]
    for number in dict.fromkeys(str(request.num_visual_tokens) for request in known):
        asked = [(request, answers[request.key]) for request in known if str(request.num_visual_tokens) == number]
        right = sum(is_right(request, answer.text) for request, answer in asked)
        row = {
            "num_visual_tokens": number,
            "questions": len(asked),
            "accuracy": round(100 * right / len(asked), 1),
            "interval_95": [round(100 * end, 1) for end in wilson_interval(right, len(asked))],
            "visual_tokens": round(sum(answer.visual_tokens for _, answer in asked) / len(asked), 1),
        }
        rows.append({**row, "seconds": round(seconds[number], 2)} if seconds and number in seconds else row)
    return rows


def is_right(request: Request, text: str) -> bool:
    """Whether `text` is one of the request's answers, ignoring case and punctuation."""
    return words(text) in map(words, request.answer)


def wilson_interval(correct: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The score interval of Wilson (1927) for a share, by default of 95 %; (0, 1) where `total` is 0."""
    if total == 0:
        return 0.0, 1.0
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)
