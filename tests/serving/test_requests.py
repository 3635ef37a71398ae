"""Requests before they reach `transformers serve`: refusals, changes, and how images are fetched."""

import asyncio
import base64
import io
import socket
import time

import pytest
from PIL import Image

from transformers_delta_llava.processing import image_utils_delta_llava
from transformers_delta_llava.serving.requests import (
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    check_conversation,
    fetch_images,
    prepare,
    to_conversation,
)


USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def encoded() -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def run(processor, body, schema=ChatRequest, limit=200) -> dict:
    return asyncio.run(prepare(body, schema, processor, limit))


def with_options(**options) -> dict:
    return {"messages": [USER], "chat_template_kwargs": options}


REFUSED = {
    "no messages": ({}, "messages is missing"),
    "empty messages": ({"messages": []}, "messages=.*at least 1"),
    "messages that are text": ({"messages": "hello"}, "messages='hello'"),
    "a message that is none": ({"messages": [None]}, "messages.0"),
    "no role": ({"messages": [{"content": "x"}]}, "messages.0.role is missing"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content: use a string, or a list of parts"),
    "a number as content": ({"messages": [{"role": "user", "content": 7}]}, "use a string, or a list of parts"),
    "a part without type": (
        {"messages": [{"role": "user", "content": [{}]}]},
        "only parts of type text and image_url",
    ),
    "a hologram": ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "are known, not hologram"),
    "a text of None": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        "needs a string",
    ),
    "an image without URL": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url needs"),
    "a template": (with_options(chat_template="{% for i in range(10**9) %}{% endfor %}"), "chat_template is unknown"),
    "a size": (with_options(processor_kwargs={"size": {"shortest_edge": 10**6}}), "processor_kwargs.size is unknown"),
    "a padding": (with_options(processor_kwargs={"padding": "max_length"}), "padding is unknown"),
    "a flat length": (with_options(max_length=10**9), "max_length is unknown"),
    "options that are none": ({"messages": [USER], "chat_template_kwargs": [1]}, "chat_template_kwargs"),
    "a bias of a word": ({"messages": [USER], "logit_bias": {"cat": 1}}, "logit_bias has a key"),
    "a bias that is a word": ({"messages": [USER], "logit_bias": {"1": "high"}}, "logit_bias.1"),
    "many tokens": ({"messages": [USER], "max_tokens": "many"}, "max_tokens='many'"),
    "a huge seed": ({"messages": [USER], "seed": 10**30}, "seed"),
    "a temperature of NaN": ({"messages": [USER], "temperature": float("nan")}, "temperature"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused(processor, case):
    body, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^The request: .*{message}") as caught:
        run(processor, body)
    assert "\n" not in str(caught.value)


def test_changes(processor):
    body = {"messages": [USER], "logit_bias": {"5": 3, "-1": 0.5}, "chat_template_kwargs": None, "seed": None}
    before = repr(body)
    prepared = run(processor, body)
    assert prepared == {"messages": [USER], "logit_bias": {"5": 3.0, "-1": 0.5}}
    assert all(type(bias) is float for bias in prepared["logit_bias"].values())
    assert repr(body) == before
    assert run(processor, with_options(processor_kwargs={"num_visual_tokens": 4}, num_visual_tokens=4))


def test_completions_are_measured_and_hold_no_image(processor):
    assert run(processor, {"prompt": "a" * 200}, CompletionRequest)
    with pytest.raises(ValueError, match="too long: it has more than 200 tokens"):
        run(processor, {"prompt": "a" * 10**6}, CompletionRequest)
    with pytest.raises(ValueError, match="The prompt holds <image>: images go to /v1/chat/completions"):
        run(processor, {"prompt": "<image>"}, CompletionRequest)


@pytest.mark.parametrize("items", ["hello", [USER], [{"type": "input_text", "text": "a"}]])
def test_responses_take_text_messages_and_parts(processor, items):
    assert run(processor, {"input": items, "instructions": "be brief"}, ResponsesRequest)["input"] == items


@pytest.mark.parametrize("items", [[], [7], [{"type": "hologram"}], [{"role": "user", "content": 3}]])
def test_other_responses_are_refused(processor, items):
    with pytest.raises(ValueError, match="^The request: input"):
        run(processor, {"input": items}, ResponsesRequest)


def image(url: str) -> dict:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def test_images_become_data_urls(processor, encoded):
    for url in (f"data:image/png;base64,{encoded}", f"data:;base64,{encoded}", f"data:text/x,{encoded}", encoded):
        (message,) = asyncio.run(fetch_images([image(url)]))
        expected = url if url.startswith("data:") else f"data:;base64,{encoded}"
        assert message["content"][0]["image_url"]["url"] == expected
    parts = [{"type": "input_image", "image_url": encoded}, {"type": "input_text", "text": "a"}]
    assert asyncio.run(fetch_images(parts))[0]["image_url"]["url"] == f"data:;base64,{encoded}"


@pytest.mark.parametrize(
    "url", ["/etc/hostname", "file:/etc/hostname", "ftp://127.0.0.1/a.png", "", "~/a.png", "x" * 3000]
)
def test_files_of_the_server_are_not_read(url):
    with pytest.raises(ValueError, match="is not a URL of an image: .*files of the server are not read"):
        asyncio.run(fetch_images([image(url)]))


def test_a_silent_url_stops_nobody_else(monkeypatch):
    monkeypatch.setattr(image_utils_delta_llava, "URL_TIMEOUT", 0.5)
    waits = []

    async def both(url: str) -> None:
        fetching = asyncio.create_task(fetch_images([image(url), image(f"{url}?2")]))
        while not fetching.done():
            start = time.monotonic()
            await asyncio.sleep(0.01)
            waits.append(time.monotonic() - start)
        await fetching

    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ValueError, match="cannot be used: .*timed out"),
    ):
        asyncio.run(both(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"))
    assert len(waits) > 5


def test_more_images_than_positions_are_not_fetched(processor):
    with pytest.raises(ValueError, match="too long: it has 201 tokens"):
        run(processor, {"messages": [image(f"http://127.0.0.1:9/{index}") for index in range(201)]})


def test_turns_in_a_row_and_developers():
    text = {"type": "text", "text": "a"}
    image_part = {"type": "image", "url": "data:,"}
    messages = [
        {"role": "developer", "content": [text]},
        {"role": "system", "content": "b"},
        {"role": "user", "content": [image_part]},
        {"role": "user", "content": [text]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": [text]},
        {"role": "tool", "content": [text]},
    ]
    assert to_conversation(messages) == [
        {"role": "system", "content": [text, {"type": "text", "text": "b"}]},
        {"role": "user", "content": [image_part, text]},
        {"role": "assistant", "content": []},
        {"role": "tool", "content": [text]},
        {"role": "tool", "content": [text]},
    ]


def test_conversations_are_measured_before_they_are_encoded(processor):
    def check(text: str, images: int = 0, **options) -> None:
        content = [{"type": "text", "text": text}, *[{"type": "image"}] * images]
        check_conversation([{"role": "user", "content": content}], options, processor, 200)

    check("a" * 200)
    check("", 200, num_visual_tokens="auto")  # each may get one
    for text, images, options in (("a" * 10**6, 0, {}), ("", 2, {"num_visual_tokens": 144}), ("", 6, {})):
        with pytest.raises(ValueError, match="The prompt is too long"):
            check(text, images, **options)
    with pytest.raises(ValueError, match="num_visual_tokens=7: this model cannot give it"):
        check("a", 1, num_visual_tokens=7)
