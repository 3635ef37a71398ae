"""Requests to `transformers serve`: what is checked and changed before the server sees them."""

import asyncio
import base64
import binascii
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image, UnidentifiedImageError
from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from ..processing import DeltaLlavaProcessor
from ..processing.image_utils_delta_llava import URL_MAX_BYTES, download
from ..utils.errors import DeltaLlavaError, one_line, shorten
from ..utils.prompts import check_prompt, check_texts
from ..utils.validation import FileModel, validate


TEXT_PARTS, IMAGE_PARTS = ("text", "input_text", "output_text"), ("image_url", "input_image")
# Each fetch ends by itself, so that a few that are slow leave threads for the others.
_FETCHING = ThreadPoolExecutor(64, "fetching")
# Roles whose turns in a row become one.
JOINED_ROLES = ("system", "user", "assistant")


class _ProcessorOptions(FileModel):
    """Options of the processor that a request may set. The processor checks the values; all other options are the server's."""

    model_config = ConfigDict(extra="forbid")

    num_visual_tokens: Any = None
    auto_max_loss: Any = None
    do_pad: Any = None


class _TemplateOptions(_ProcessorOptions):
    """Options of the chat template that a request may set: only the processor's. A template of its own could loop."""

    processor_kwargs: _ProcessorOptions | None = None


class _Message(FileModel):
    role: str
    content: Any = Field(None, validate_default=True)

    @field_validator("content")
    @classmethod
    def _check_parts(cls, content: Any, info: ValidationInfo) -> Any:
        # Without content an assistant calls tools.
        if isinstance(content, str) or (content is None and info.data.get("role") == "assistant"):
            return content
        if not isinstance(content, list):
            raise ValueError("use a string, or a list of parts of type text and image_url")
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in TEXT_PARTS:
                if not isinstance(part.get("text"), str):
                    raise ValueError("a part of type text needs a string as its text")
            elif kind in IMAGE_PARTS:
                if _image_url(part) is None:
                    raise ValueError(f'a part of type {kind} needs {{"image_url": {{"url": "..."}}}}')
            else:
                raise ValueError(f"only parts of type text and image_url are known, not {shorten(kind or part)}")
        return content


class Request(FileModel):
    """Fields of every endpoint, as far as the server itself does not check them."""

    chat_template_kwargs: _TemplateOptions | None = None
    generation_config: str | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None


class ChatRequest(Request):
    """Of `/v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1)


class CompletionRequest(Request):
    """Of `/v1/completions`."""

    prompt: str = ""


class ResponsesRequest(Request):
    """Of `/v1/responses`: a text, messages, or the parts of one message."""

    input: Any
    instructions: str | None = None

    @field_validator("input")
    @classmethod
    def _check_items(cls, items: Any) -> Any:
        if isinstance(items, list):
            if not items or not all(isinstance(item, dict) for item in items):
                raise ValueError("use a string, or a list of messages")
            for item in items if "role" in items[0] else [{"role": "user", "content": items}]:
                if "role" in item:
                    _Message.model_validate(item)
        return items


async def prepare(body: dict, schema: type[Request], processor: DeltaLlavaProcessor, limit: int | None) -> dict:
    """
    A request as the server takes it.

    Args:
        body: the request; it is left as it is.
        schema: of the endpoint's requests.
        processor: of the model.
        limit: the model's positions.

    Raises:
        DeltaLlavaError: what is wrong with it, in one sentence.
    """
    request = validate(schema, body, "The request")
    body = {name: value for name, value in body.items() if value is not None}
    if request.logit_bias is not None:
        if not all(token.lstrip("-").isdecimal() for token in request.logit_bias):
            raise DeltaLlavaError("The request: logit_bias has a key that is not the number of a token.")
        body["logit_bias"] = request.logit_bias  # generation wants floats, JSON has whole numbers, too
    if isinstance(request, CompletionRequest):
        if processor.image_token in request.prompt:
            raise DeltaLlavaError(f"The prompt holds {processor.image_token}: images go to /v1/chat/completions.")
        check_texts([request.prompt], processor.tokenizer, limit)
    for name in ("messages", "input"):
        if isinstance(body.get(name), list):
            images = sum(_image_url(part) is not None for part in _parts(body[name]))
            check_prompt(images * min(processor.visual_token_budgets), limit)
            body[name] = await fetch_images(body[name])
    return body


async def fetch_images(messages: list) -> list:
    """
    A copy of `messages` whose images are all data URLs: those of the network are read here, side by side, while other
    requests are served.

    Raises:
        DeltaLlavaError: a URL that gives no image in time, or a path on this machine, which nobody may read from outside.
    """
    messages = [_copy(message) for message in messages]
    parts = [(part, url) for part in _parts(messages) if (url := _image_url(part)) is not None]
    remote = sorted({url for _, url in parts if url[:8].lower().startswith(("http://", "https://"))})
    contents = {url: _data_url(url) for _, url in parts if url not in remote}
    loop, limit = asyncio.get_running_loop(), URL_MAX_BYTES // max(1, len(remote))  # for all of them together
    try:
        fetched = await asyncio.gather(*(loop.run_in_executor(_FETCHING, download, url, limit) for url in remote))
    except Exception as error:  # whatever the network raises
        raise DeltaLlavaError(f"An image cannot be used: {one_line(error)}.") from error
    contents |= {url: f"data:;base64,{base64.b64encode(data).decode()}" for url, data in zip(remote, fetched)}
    for part, url in parts:
        part["image_url"] = {"url": contents[url]}
    return messages


def _data_url(url: str) -> str:
    if url[:5].lower() == "data:":
        return url
    try:  # base64 without a header
        Image.open(io.BytesIO(base64.b64decode(url, validate=True))).close()
    except (binascii.Error, UnidentifiedImageError, ValueError, OSError) as error:
        raise DeltaLlavaError(
            f"{shorten(url, 100)!r} is not a URL of an image: use https:, http: or data:; files of the server are not read."
        ) from error
    return f"data:;base64,{url}"


def _copy(item: Any) -> Any:
    """A message or a part whose dictionaries may be changed."""
    if not isinstance(item, dict):
        return item
    content = item.get("content")
    return {**item, "content": [_copy(part) for part in content]} if isinstance(content, list) else dict(item)


def _parts(items: list) -> Iterator[dict]:
    """The parts of messages' content, and those `items` that are parts themselves."""
    for item in items:
        if isinstance(item, dict):
            yield item
            if isinstance(item.get("content"), list):
                yield from (part for part in item["content"] if isinstance(part, dict))


def _image_url(part: dict) -> str | None:
    """The URL of an image part; None where it has none, or is of another type."""
    url = part.get("image_url") if part.get("type") in IMAGE_PARTS else None
    url = url.get("url") if isinstance(url, dict) else url
    return url if isinstance(url, str) else None


def to_conversation(messages: list[dict]) -> list[dict]:
    """
    `messages` as the chat templates take them: a developer is the system, and turns of one role in a row are one.

    Args:
        messages: with content as text, or as a list of parts of type text and image.
    """
    turns: list[dict] = []
    for message in messages:
        role = "system" if message["role"] == "developer" else message["role"]
        content = message.get("content") or []
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if turns and role in JOINED_ROLES and turns[-1]["role"] == role:
            turns[-1] = {**turns[-1], "content": [*turns[-1]["content"], *content]}
        else:
            turns.append({**message, "role": role, "content": content})
    return turns


def check_conversation(turns: list[dict], options: dict, processor: DeltaLlavaProcessor, limit: int | None) -> None:
    """
    Refuse a conversation that is longer than the model's positions, before anything of it is encoded whole.

    Args:
        turns: of `to_conversation`.
        options: of the processor's call.
        processor: of the model.
        limit: the model's positions.

    Raises:
        DeltaLlavaError: it is longer.
        ValueError: `num_visual_tokens` is not what the processor takes.
    """
    parts = [part for turn in turns for part in turn["content"]]
    check_texts([part["text"] for part in parts if part["type"] == "text"], processor.tokenizer, limit)
    images = sum(part["type"] == "image" for part in parts)
    choices = processor.resolve_num_visual_tokens(options.get("num_visual_tokens"), images)
    least = min(processor.visual_token_budgets)
    check_prompt(sum(least if isinstance(choice, str) else choice for choice in choices), limit)
