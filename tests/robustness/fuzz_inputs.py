"""Images, chats and requests from seeds, of every kind that people and programs send, whole and spoiled.

    python -m tests.robustness.fuzz_inputs images 1000
    python -m tests.robustness.fuzz_inputs chats 1000
    python -m tests.robustness.fuzz_inputs requests 1000

Each case ends in the right result or in one sentence that is a ValueError, within 10 seconds; anything else is printed with its
seed, and the exit code is 1.
"""

import asyncio
import base64
import io
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaProcessor
from transformers_delta_llava.serving.transformers_serve import (
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    check_conversation,
    prepare,
    to_conversation,
)


LIMIT = 10.0
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


def main() -> None:
    """Run the cases of a kind, and print what went wrong."""
    kind, count = sys.argv[1], int(sys.argv[2])
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    counts, slowest = {"result": 0, "refused": 0}, 0.0
    faults = 0
    for seed in range(first, first + count):
        start = time.monotonic()
        try:
            counts[run_case(kind, seed)] += 1
        except BaseException:
            faults += 1
            print(f"seed {seed}:\n{traceback.format_exc()}")
        spent = time.monotonic() - start
        slowest = max(slowest, spent)
        if spent > LIMIT:
            faults += 1
            print(f"seed {seed}: {spent:.1f} seconds")
    print(f"{kind}: {count} cases from {first}, {counts}, {faults} faults, slowest {slowest:.2f} seconds")
    sys.exit(1 if faults else 0)


def run_case(kind: str, seed: int) -> str:
    """`"result"` or `"refused"`; an AssertionError where the result is wrong, any other exception where it should not be."""
    generator = random.Random(f"{kind} {seed}")
    try:
        KINDS[kind](generator)
    except ValueError as error:
        assert str(error).strip() and "\n" not in str(error), f"not one line: {error!r}"
        return "refused"
    except StrictDataclassError:  # what transformers says of a setting of another type
        return "refused"
    return "result"


def try_image(generator: random.Random) -> None:
    """An image, or several, with or without settings of the call."""
    processor = PROCESSOR
    images = [make_image(generator) for _ in range(generator.choice([1, 1, 1, 2, 3]))]
    given: Any = images[0] if len(images) == 1 and generator.random() < 0.5 else images
    given = generator.choice([given, given, tuple(images), iter(images), (image for image in images)])
    options = {}
    if generator.random() < 0.3:
        options["num_visual_tokens"] = generator.choice([1, 4, 9, 36, 144, "auto", *ODD])
    if generator.random() < 0.3:
        options["do_pad"] = generator.choice([True, False, *ODD])
    if generator.random() < 0.3:
        name = generator.choice(
            ["size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale", "max_length"]
        )
        sizes = [SIDE, 1, 10**6, {"shortest_edge": 48}, {"height": SIDE, "width": SIDE}, {"height": -3}, (SIDE, SIDE)]
        options[name] = generator.choice([*sizes, True, False, *ODD])
    before = dict(options)
    text = "<image>" * len(images)
    inputs = processor(images=given, text=text, return_tensors="pt", **options)
    assert options.keys() == before.keys()
    pixels = inputs["pixel_values"]
    assert pixels.shape == (len(images), 3, SIDE, SIDE) and pixels.dtype == torch.float32 and pixels.isfinite().all()
    budgets = inputs.get("num_visual_tokens", torch.tensor([processor.image_seq_length] * len(images)))
    assert (inputs["input_ids"] == processor.image_token_id).sum() == budgets.sum()
    if not options:
        for image, row in zip(images, pixels):
            if isinstance(image, Image.Image) and image.mode == "RGB" and max(image.size) < 2000:
                square = Image.new("RGB", (max(image.size),) * 2, (122, 116, 104))
                square.paste(image, tuple((max(image.size) - length) // 2 for length in image.size))  # type: ignore[arg-type]
                assert torch.equal(row, processor.image_processor(square, return_tensors="pt")["pixel_values"][0])


def make_image(generator: random.Random) -> Any:
    """An image in any form, often spoiled."""
    kinds: list[Callable[[random.Random], Any]] = [pil_image, pil_image, array, array, encoded, encoded, text_of, odd]
    return generator.choice(kinds)(generator)


def pil_image(generator: random.Random) -> Image.Image:
    """A PIL image of any mode and shape."""
    width, height = (generator.choice([1, 2, 7, 23, 24, 25, 100, 333]) for _ in "ab")
    if generator.random() < 0.1:
        width, height = generator.choice([(1, 60000), (60000, 1), (3, 20000), (10**6, 1), (0, 5)])
    mode = generator.choice(MODES)
    image = Image.new("RGB", (width, height), tuple(generator.randrange(256) for _ in range(3)))
    if 0 < width * height < 10**5:
        values = np.random.default_rng(generator.randrange(2**32)).integers(0, 256, (height, width, 3), np.uint8)
        image = Image.fromarray(values)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257) if width * height else image
    return image.convert("L").convert(mode) if mode in ("I", "F") else image.convert(mode)


def array(generator: random.Random) -> Any:
    """An array or tensor of any shape, type and range."""
    rng = np.random.default_rng(generator.randrange(2**32))
    shape = generator.choice(
        [(5, 7), (5, 7, 3), (3, 5, 7), (4, 9, 9), (9, 9, 1), (5, 7, 2), (0, 3, 3), (3,), (), (2, 5, 7, 3)]
    )
    dtype = generator.choice(
        ["uint8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "bool", "complex64"]
    )
    low, high = generator.choice([(0, 1), (0, 255), (0, 65535), (-1, 1), (-1e38, 1e38), (5, 5)])
    with np.errstate(all="ignore"):
        values = (rng.random(shape) * (high - low) + low).astype(dtype)
    if generator.random() < 0.1 and values.dtype.kind == "f" and values.size:
        values.flat[0] = generator.choice([np.nan, np.inf])
    if generator.random() < 0.3 and dtype not in ("uint16", "complex64"):
        return torch.from_numpy(np.array(values))
    return values


def encoded(generator: random.Random) -> bytes:
    """A file of any format, whole or damaged."""
    file = io.BytesIO()
    image = pil_image(generator).convert("RGB") if generator.random() < 0.9 else Image.new("RGB", (5, 5))
    if 0 in image.size or max(image.size) > 1000:
        image = Image.new("RGB", (9, 4))
    image.save(file, generator.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA"]))
    data = bytearray(file.getvalue())
    damage = generator.random()
    if damage < 0.2:
        data = data[: generator.randrange(len(data))]
    elif damage < 0.5:
        for _ in range(generator.choice([1, 5, 50])):
            data[generator.randrange(len(data))] = generator.randrange(256)
    elif damage < 0.6:
        data = bytearray(generator.randbytes(len(data)))
    return bytes(data)


def text_of(generator: random.Random) -> Any:
    """An image as text, a mapping or a file, or what only looks like one."""
    data = encoded(generator)
    plain = base64.b64encode(data).decode()
    return generator.choice(
        [
            plain,
            plain[: len(plain) // 2],
            f"data:image/png;base64,{plain}",
            f"data:;base64,{plain}",
            f"data:{generator.choice(WORDS)},{plain[:50]}",
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
            generator.choice(WORDS),
        ]
    )


def odd(generator: random.Random) -> Any:
    """No image at all."""
    return generator.choice([value for value in ODD if value is not None and value != [] and value != [[]]])


def try_chat(generator: random.Random) -> None:
    """A conversation, whole or spoiled: as many visual tokens as its images get, and one BOS."""
    processor = PROCESSOR
    images = [0]

    def part() -> Any:
        if generator.random() < 0.04:
            return generator.choice(
                [*ODD, {"type": "audio"}, {"type": "text"}, {"type": ["text"]}, {"text": "x"}, "bare"]
            )
        if generator.random() < 0.3:
            images[0] += 1
            return {"type": "image", generator.choice(["image", "image", "url"]): Image.new("RGB", (5, 9), "red")}
        return {"type": "text", "text": words(generator)}

    def message(role: str) -> Any:
        if generator.random() < 0.03:
            return generator.choice([*ODD, {"role": role}, {"content": "x"}, {"role": 7, "content": "x"}])
        kind = generator.random()
        if kind < 0.3:
            return {"role": role, "content": words(generator, placeholders=False)}
        if kind < 0.33:
            return {"role": role, "content": generator.choice(ODD)}
        return {"role": role, "content": [part() for _ in range(generator.randrange(4))]}

    roles = [("user", "assistant")[index % 2] for index in range(generator.choice([1, 1, 3, 5]))]
    if generator.random() < 0.3:
        roles.insert(0, "system")
    if generator.random() < 0.1:
        generator.shuffle(roles)
    conversation: Any = [message(role) for role in roles]
    if generator.random() < 0.1:
        conversation = generator.choice([conversation[:0], (item for item in conversation), tuple(conversation), *ODD])
    budget = generator.choice([1, 4, 36])
    inputs = processor.apply_chat_template(
        conversation,
        add_generation_prompt=generator.random() < 0.5,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"num_visual_tokens": budget, "return_tensors": "pt"},
    )
    ids = inputs["input_ids"]
    assert (ids == processor.image_token_id).sum() == images[0] * budget
    assert ("pixel_values" in inputs) == (images[0] > 0)


def words(generator: random.Random, placeholders: bool = True) -> str:
    """A text with all that a template or a tokenizer could trip over."""
    chosen = [generator.choice(WORDS) for _ in range(generator.randrange(6))]
    if generator.random() > 0.1:  # rarely, or next to nothing would pass
        chosen = [word for word in chosen if word != "\ud800"]
    return " ".join(word for word in chosen if placeholders or word != "<image>")


def try_request(generator: random.Random) -> None:
    """A request to `delta-llava serve`: what passes has text, images as data URLs, and fits."""
    spoiled = [
        *ODD[:-1],
        "x" * 10**5,
        {"type": "text"},
        [{"type": "image_url"}],
        [{"type": "text", "text": "a" * 10**5}],
    ]

    def content() -> Any:
        if generator.random() < 0.1:
            return generator.choice(spoiled)
        url = f"data:image/png;base64,{base64.b64encode(encoded(generator)).decode()}"
        if generator.random() < 0.2:
            url = generator.choice(
                ["/etc/hostname", Path("/etc/hostname").as_uri(), "http://127.0.0.1:9/", "", "data:", "x"]
            )
        parts = [{"type": "text", "text": words(generator)}, {"type": "image_url", "image_url": {"url": url}}]
        return generator.choice([words(generator), parts, parts[:1]])

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
    messages = [{"role": generator.choice(roles), "content": content()} for _ in range(generator.randrange(4))]
    body: dict[str, Any] = {"messages": messages, "input": messages, "prompt": words(generator)}
    if generator.random() < 0.4:
        body[generator.choice(names)] = generator.choice(spoiled)
    if generator.random() < 0.2:
        option = generator.choice(["num_visual_tokens", "do_pad", "size", "padding", "chat_template"])
        body["chat_template_kwargs"] = {"processor_kwargs": {option: generator.choice([4, *ODD[:-1]])}}
    kind = generator.choice([ChatRequest, ChatRequest, ResponsesRequest, CompletionRequest])
    found = asyncio.run(prepare(body, kind, PROCESSOR, 2048))
    assert None not in found.values()
    if kind is ChatRequest:
        turns = to_conversation([{**message, "content": parts_of(message)} for message in found["messages"]])
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


KINDS = {"images": try_image, "chats": try_chat, "requests": try_request}
PROCESSOR: DeltaLlavaProcessor = tiny_processor(tiny_config())


if __name__ == "__main__":
    main()
