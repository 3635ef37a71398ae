"""Requests of the OpenAI API: valid ones of the tests' cases, and malformed ones from seeds."""

import base64
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path


Request = dict
Mutation = Callable[[Request, random.Random], Request]


def data_url(image: str | bytes) -> str:
    """A PNG file, or its bytes, as a data URL."""
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def messages(case: dict) -> list[dict]:
    """The case's content as a user message, with images as data URLs."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(item["url"])}} if item["type"] == "image" else item
        for item in case["content"]
    ]
    return [{"role": "user", "content": content}]


def malformed_requests(good: Request, image: bytes, count: int) -> list[tuple[str, bytes]]:
    """`count` pairs of what is wrong and a body, each the request `good` (its last item of content a text) with one fault."""
    generator = random.Random(0)
    faults = list(FAULTS.items())
    requests = []
    for index in range(count):
        name, mutate = faults[index % len(faults)]
        body = mutate({**copy.deepcopy(good), "image": image}, generator)
        requests.append((name, body if isinstance(body, bytes) else json.dumps(drop(body, "image")).encode()))
    return requests


def drop(request: Request, name: str) -> Request:
    return {key: value for key, value in request.items() if key != name}


def with_budget(request: Request, generator: random.Random) -> Request:
    """A number of visual tokens that the grid cannot give, or no number at all."""
    choices = (0, -1, 7, 63, 10**30, 1.5, "16", True, [], [16, 4], [None], {"a": 1}, [[16]], "x" * 5000, 65)
    return {**request, "mm_processor_kwargs": {"num_visual_tokens": generator.choice(choices)}}


def with_url(request: Request, url: str) -> Request:
    content = [{"type": "image_url", "image_url": {"url": url}}, request["messages"][0]["content"][-1]]
    return {**request, "messages": [{"role": "user", "content": content}]}


def with_noise(request: Request, generator: random.Random) -> Request:
    """Bytes that are not an image."""
    noise = base64.b64encode(generator.randbytes(generator.randint(0, 4000))).decode()
    return with_url(request, f"data:image/{generator.choice(['png', 'jpeg', 'webp', 'x'])};base64,{noise}")


def with_cut_image(request: Request, generator: random.Random) -> Request:
    """The beginning of an image."""
    part = request["image"][: generator.randint(1, len(request["image"]) // 2)]
    return with_url(request, f"data:image/png;base64,{base64.b64encode(part).decode()}")


def with_bad_url(request: Request, generator: random.Random) -> Request:
    """Somewhere that cannot be reached, or that nobody may read."""
    urls = (
        "http://127.0.0.1:9/a.png",
        "http://no.such.host.invalid/a.png",
        Path("/etc/hostname").as_uri(),
        "/etc/hostname",
        "",
    )
    more = (
        "ftp://127.0.0.1/a.png",
        "data:image/png;base64,%%%",
        "data:,",
        "data:image/png;base64",
        "http://",
        "x" * 3000,
    )
    return with_url(request, generator.choice(urls + more))


def with_many_images(request: Request, generator: random.Random) -> Request:
    """More images than the server was started for."""
    image = {"type": "image_url", "image_url": {"url": data_url(request["image"])}}
    content = [image] * generator.randint(3, 6) + [{"type": "text", "text": "?"}]
    return {**request, "messages": [{"role": "user", "content": content}]}


def with_bad_roles(request: Request, generator: random.Random) -> Request:
    """Turns that do not alternate, or begin with the wrong one."""
    roles = (
        ["assistant", "user"],
        ["user", "user"],
        ["user", "system"],
        ["wizard"],
        [""],
        ["user", "assistant", "system"],
    )
    return {**request, "messages": [{"role": role, "content": "hello"} for role in generator.choice(roles)]}


def with_bad_messages(request: Request, generator: random.Random) -> Request:
    """No conversation."""
    choices = ([], "hello", None, 3, [[]], [None], [{}], [{"role": "user"}], [{"content": "x"}], {"role": "user"})
    return {**request, "messages": generator.choice(choices)}


def with_bad_content(request: Request, generator: random.Random) -> Request:
    """Content of a kind that the model does not have, or of none."""
    choices = (
        [{"type": "image_url"}],
        [{"type": "image_url", "image_url": {}}],
        [{"type": "image_url", "image_url": {"url": 3}}],
        [{"type": "hologram", "hologram": "x"}],
        [{"type": "text"}],
        {"type": "text"},
        7,
    )
    return {**request, "messages": [{"role": "user", "content": generator.choice(choices)}]}


def with_video(request: Request, generator: random.Random) -> Request:
    """A film, for a model that looks at images only."""
    film = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    return {**request, "messages": [{"role": "user", "content": [film, {"type": "text", "text": "?"}]}]}


def with_image_in_an_answer(request: Request, generator: random.Random) -> Request:
    """An image that the assistant shows."""
    content = request["messages"][0]["content"]
    return {**request, "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]}


def with_marker_in_text(request: Request, generator: random.Random) -> Request:
    """More placeholders than images."""
    content = copy.deepcopy(request["messages"][0]["content"])
    content[-1]["text"] = "<image>" * generator.randint(1, 5) + "?"
    return {**request, "messages": [{"role": "user", "content": content}]}


def with_long_text(request: Request, generator: random.Random) -> Request:
    """More text than the model takes."""
    return {**request, "messages": [{"role": "user", "content": "shape " * generator.randint(2000, 5000)}]}


def with_bad_option(request: Request, generator: random.Random) -> Request:
    """A setting out of its range or of the wrong kind."""
    choices = ({"max_tokens": -1}, {"max_tokens": "many"}, {"temperature": -3}, {"n": 0}, {"top_p": 7}, {"model": 3})
    return {**request, **generator.choice(choices)}


def with_no_json(request: Request, generator: random.Random) -> bytes:
    """Anything but JSON."""
    body = json.dumps(drop(request, "image")).encode()
    return generator.choice([b"", b"{", b"[]", b"null", b"\xff\xfe", body[: len(body) // 2], generator.randbytes(200)])


FAULTS: dict[str, Mutation] = {
    "budget": with_budget,
    "noise": with_noise,
    "cut image": with_cut_image,
    "url": with_bad_url,
    "many images": with_many_images,
    "roles": with_bad_roles,
    "messages": with_bad_messages,
    "content": with_bad_content,
    "video": with_video,
    "image in an answer": with_image_in_an_answer,
    "marker in text": with_marker_in_text,
    "long text": with_long_text,
    "option": with_bad_option,
    "no JSON": with_no_json,
}
