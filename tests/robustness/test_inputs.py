"""Random images, chats and requests, valid and invalid: each ends in the right result or in a ValueError of one sentence.

Sixty seeds of each kind here; `FUZZ_CASES=1000 FUZZ_SEED=60 python -m pytest tests/robustness/test_inputs.py` for more.
"""

import asyncio
import base64
import io
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava.serving.requests import (
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    check_conversation,
    prepare,
    to_conversation,
)


CASES = int(os.environ.get("FUZZ_CASES", "60"))
FIRST_SEED = int(os.environ.get("FUZZ_SEED", "0"))
LIMIT = 10.0  # seconds
PROCESSOR = tiny_processor(tiny_config())
SIDE = 24
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16")
ODD = (
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    b"",
    [],
    [[]],
    {},
    {"a": 1},
    object(),
)
WORDS = (
    "what",
    "shape?",
    "<image>",
    "</s>",
    "<s>",
    "\n",
    "\0",
    "\ud800",
    "\u202e",
    "é漢🙂",
    "{{ 7 * 7 }}",
    "{% endif %}",
    " " * 50,
)


@pytest.mark.parametrize("kind", ["images", "chats", "requests"])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_inputs_end_in_a_result_or_in_one_sentence(kind: str) -> None:
    check = {"images": check_images, "chats": check_chat, "requests": check_request}[kind]
    outcomes = set()
    for seed in range(FIRST_SEED, FIRST_SEED + CASES):
        start = time.monotonic()
        try:
            check(random.Random(f"{kind} {seed}"))
            outcomes.add("result")
        except (ValueError, StrictDataclassError) as error:  # the second is transformers' for settings of another type
            one_line = str(error).strip() and "\n" not in str(error)
            assert one_line or isinstance(error, StrictDataclassError), f"seed {seed}: {error!r}"
            outcomes.add("refused")
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
        assert time.monotonic() - start < LIMIT, f"seed {seed}"
    assert outcomes == {"result", "refused"}


def check_images(rng: random.Random) -> None:
    """An image, or several, with or without settings of the call."""
    images = [make_image(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    given: Any = images[0] if len(images) == 1 and rng.random() < 0.5 else images
    given = rng.choice([given, given, tuple(images), iter(images), (image for image in images)])
    options = {}
    if rng.random() < 0.3:
        options["num_visual_tokens"] = rng.choice([1, 4, 9, 36, 144, "auto", *ODD])
    if rng.random() < 0.3:
        options["do_pad"] = rng.choice([True, False, *ODD])
    if rng.random() < 0.3:
        name = rng.choice(["size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale", "max_length"])
        sizes = [SIDE, 1, 10**6, {"shortest_edge": 48}, {"height": SIDE, "width": SIDE}, {"height": -3}, (SIDE, SIDE)]
        options[name] = rng.choice([*sizes, True, False, *ODD])
    before = dict(options)
    text = "<image>" * len(images)
    inputs = PROCESSOR(images=given, text=text, return_tensors="pt", **options)
    assert options.keys() == before.keys()
    pixels = inputs["pixel_values"]
    assert pixels.shape == (len(images), 3, SIDE, SIDE) and pixels.dtype == torch.float32 and pixels.isfinite().all()
    budgets = inputs.get("num_visual_tokens", torch.tensor([PROCESSOR.image_seq_length] * len(images)))
    assert (inputs["input_ids"] == PROCESSOR.image_token_id).sum() == budgets.sum()
    if not options:
        for image, row in zip(images, pixels):
            if isinstance(image, Image.Image) and image.mode == "RGB" and max(image.size) < 2000:
                square = Image.new("RGB", (max(image.size),) * 2, (122, 116, 104))
                square.paste(image, tuple((max(image.size) - length) // 2 for length in image.size))  # type: ignore[arg-type]
                assert torch.equal(row, PROCESSOR.image_processor(square, return_tensors="pt")["pixel_values"][0])


def make_image(rng: random.Random) -> Any:
    """An image in any form, often an invalid one."""
    kinds: list[Callable[[random.Random], Any]] = [pil_image, pil_image, array, array, encoded, encoded, text_of, odd]
    return rng.choice(kinds)(rng)


def pil_image(rng: random.Random) -> Image.Image:
    """A PIL image of any mode and shape."""
    width, height = (rng.choice([1, 2, 7, 23, 24, 25, 100, 333]) for _ in "ab")
    if rng.random() < 0.1:
        width, height = rng.choice([(1, 60000), (60000, 1), (3, 20000), (10**6, 1), (0, 5)])
    mode = rng.choice(MODES)
    image = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
    if 0 < width * height < 10**5:
        values = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3), np.uint8)
        image = Image.fromarray(values)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257) if width * height else image
    return image.convert("L").convert(mode) if mode in ("I", "F") else image.convert(mode)


def array(rng: random.Random) -> Any:
    """An array or tensor of any shape, type and range."""
    numpy_rng = np.random.default_rng(rng.randrange(2**32))
    shape = rng.choice(
        [(5, 7), (5, 7, 3), (3, 5, 7), (4, 9, 9), (9, 9, 1), (5, 7, 2), (0, 3, 3), (3,), (), (2, 5, 7, 3)]
    )
    dtype = rng.choice(
        ["uint8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "bool", "complex64"]
    )
    low, high = rng.choice([(0, 1), (0, 255), (0, 65535), (-1, 1), (-1e38, 1e38), (5, 5)])
    with np.errstate(all="ignore"):
        values = (numpy_rng.random(shape) * (high - low) + low).astype(dtype)
    if rng.random() < 0.1 and values.dtype.kind == "f" and values.size:
        values.flat[0] = rng.choice([np.nan, np.inf])
    if rng.random() < 0.3 and dtype not in ("uint16", "complex64"):
        return torch.from_numpy(np.array(values))
    return values


def encoded(rng: random.Random) -> bytes:
    """A file of any format, whole or damaged."""
    file = io.BytesIO()
    image = pil_image(rng).convert("RGB") if rng.random() < 0.9 else Image.new("RGB", (5, 5))
    if 0 in image.size or max(image.size) > 1000:
        image = Image.new("RGB", (9, 4))
    image.save(file, rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA"]))
    data = bytearray(file.getvalue())
    damage = rng.random()
    if damage < 0.2:
        data = data[: rng.randrange(len(data))]
    elif damage < 0.5:
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif damage < 0.6:
        data = bytearray(rng.randbytes(len(data)))
    return bytes(data)


def text_of(rng: random.Random) -> Any:
    """An image as text, a mapping or a file, or what only looks like one."""
    data = encoded(rng)
    plain = base64.b64encode(data).decode()
    return rng.choice(
        [
            plain,
            plain[: len(plain) // 2],
            f"data:image/png;base64,{plain}",
            f"data:;base64,{plain}",
            f"data:{rng.choice(WORDS)},{plain[:50]}",
            io.BytesIO(data),
            {"bytes": data, "path": None},
            {"path": "nowhere.png"},
            {"bytes": {"bytes": data}},
            "nowhere.png",
            "~nobody/a.png",
            Path("/nowhere.png").as_uri(),
            "file:nowhere",
            "http://127.0.0.1:9/a.png",
            "http://",
            "https://[::1",
            "http://a b/",
            "\0",
            "\ud800",
            "x" * 5000,
            rng.choice(WORDS),
        ]
    )


def odd(rng: random.Random) -> Any:
    """A value that is not an image."""
    return rng.choice([value for value in ODD if value is not None and value != [] and value != [[]]])


def check_chat(rng: random.Random) -> None:
    """A conversation, whole or invalid: as many visual tokens as its images get, and one BOS."""
    images = [0]

    def part() -> Any:
        if rng.random() < 0.04:
            return rng.choice([*ODD, {"type": "audio"}, {"type": "text"}, {"type": ["text"]}, {"text": "x"}, "bare"])
        if rng.random() < 0.3:
            images[0] += 1
            return {"type": "image", rng.choice(["image", "image", "url"]): Image.new("RGB", (5, 9), "red")}
        return {"type": "text", "text": words(rng)}

    def message(role: str) -> Any:
        if rng.random() < 0.03:
            return rng.choice([*ODD, {"role": role}, {"content": "x"}, {"role": 7, "content": "x"}])
        kind = rng.random()
        if kind < 0.3:
            return {"role": role, "content": words(rng, placeholders=False)}
        if kind < 0.33:
            return {"role": role, "content": rng.choice(ODD)}
        return {"role": role, "content": [part() for _ in range(rng.randrange(4))]}

    roles = [("user", "assistant")[index % 2] for index in range(rng.choice([1, 1, 3, 5]))]
    if rng.random() < 0.3:
        roles.insert(0, "system")
    if rng.random() < 0.1:
        rng.shuffle(roles)
    conversation: Any = [message(role) for role in roles]
    if rng.random() < 0.1:
        conversation = rng.choice([conversation[:0], (item for item in conversation), tuple(conversation), *ODD])
    budget = rng.choice([1, 4, 36])
    inputs = PROCESSOR.apply_chat_template(
        conversation,
        add_generation_prompt=rng.random() < 0.5,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"num_visual_tokens": budget, "return_tensors": "pt"},
    )
    ids = inputs["input_ids"]
    assert (ids == PROCESSOR.image_token_id).sum() == images[0] * budget
    assert ("pixel_values" in inputs) == (images[0] > 0)


def words(rng: random.Random, placeholders: bool = True) -> str:
    """A text with all that a template or a tokenizer could trip over."""
    chosen = [rng.choice(WORDS) for _ in range(rng.randrange(6))]
    if rng.random() > 0.1:  # rarely, or next to nothing would pass
        chosen = [word for word in chosen if word != "\ud800"]
    return " ".join(word for word in chosen if placeholders or word != "<image>")


def check_request(rng: random.Random) -> None:
    """A request to `delta-llava serve`: what passes has text, images as data URLs, and fits."""
    invalid = [
        *ODD[:-1],
        "x" * 10**5,
        {"type": "text"},
        [{"type": "image_url"}],
        [{"type": "text", "text": "a" * 10**5}],
    ]

    def content() -> Any:
        if rng.random() < 0.1:
            return rng.choice(invalid)
        url = f"data:image/png;base64,{base64.b64encode(encoded(rng)).decode()}"
        if rng.random() < 0.2:
            url = rng.choice(
                ["/etc/hostname", Path("/etc/hostname").as_uri(), "http://127.0.0.1:9/", "", "data:", "x"]
            )
        parts = [{"type": "text", "text": words(rng)}, {"type": "image_url", "image_url": {"url": url}}]
        return rng.choice([words(rng), parts, parts[:1]])

    names = (
        "messages",
        "input",
        "prompt",
        "chat_template_kwargs",
        "logit_bias",
        "seed",
        "max_tokens",
        "temperature",
        "stream",
    )
    roles = ["system", "developer", "user", "user", "assistant", "tool"]
    messages = [{"role": rng.choice(roles), "content": content()} for _ in range(rng.randrange(4))]
    body: dict[str, Any] = {"messages": messages, "input": messages, "prompt": words(rng)}
    if rng.random() < 0.4:
        body[rng.choice(names)] = rng.choice(invalid)
    if rng.random() < 0.2:
        option = rng.choice(["num_visual_tokens", "do_pad", "size", "padding", "chat_template"])
        body["chat_template_kwargs"] = {"processor_kwargs": {option: rng.choice([4, *ODD[:-1]])}}
    kind = rng.choice([ChatRequest, ChatRequest, ResponsesRequest, CompletionRequest])
    prepared = asyncio.run(prepare(body, kind, PROCESSOR, 2048))
    assert None not in prepared.values()
    if kind is ChatRequest:
        turns = to_conversation([{**message, "content": parts_of(message)} for message in prepared["messages"]])
        check_conversation(turns, {}, PROCESSOR, 2048)
        assert all(a["role"] != b["role"] or a["role"] == "tool" for a, b in zip(turns, turns[1:]))
        urls = [part["url"] for turn in turns for part in turn["content"] if part["type"] == "image"]
        assert all(url.startswith("data:") for url in urls)


def parts_of(message: dict) -> list[dict]:
    """The content of a request's message as transformers' server hands it on."""
    content = message.get("content") or []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        part if part["type"] == "text" else {"type": "image", "url": part["image_url"]["url"]}
        for part in content
        if part["type"] in ("text", "image_url")
    ]
