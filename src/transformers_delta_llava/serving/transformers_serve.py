"""`transformers serve` with what it lacks for Delta-LLaVA: every request is checked first."""

import asyncio
import base64
import binascii
import copy
import functools
import io
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image, UnidentifiedImageError
from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from ..analysis import load_config
from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..processing.image_utils_delta_llava import URL_MAX_BYTES, download
from ..utils.errors import DeltaLlavaError, one_line, shorten
from ..utils.prompts import check_prompt, check_texts, max_prompt_tokens
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
    messages = copy.deepcopy(messages)
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
    choices = processor._resolve_choices(options.get("num_visual_tokens"), images)
    least = min(processor.visual_token_budgets)
    check_prompt(sum(least if isinstance(choice, str) else choice for choice in choices), limit)


# What the server and the processor raise for a bad request. The server itself would answer 500.
BAD_REQUEST = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
# Beams, or sequences, of one request at most.
MAX_SEQUENCES = 16


def serve(repo: str, arguments: Sequence[str] = (), num_visual_tokens: int | None = None) -> None:
    """
    Serve `repo` over the OpenAI API until the process is ended.

    The model's code is this package's, not the repo's.

    Args:
        repo: folder or Hub id of a Delta-LLaVA.
        arguments: further arguments of `transformers serve`, such as `["--port", "8001"]`.
        num_visual_tokens: visual tokens per image where a request does not say; by default the repo's.

    Raises:
        ValueError: there is no such repo, it holds another model, it does not have this budget, or the server's
            dependencies are not installed.
    """
    if not is_serve_available():
        raise ValueError("The server's dependencies are missing: pip install 'transformers-delta-llava[serve]'.")
    config = load_config(repo)
    defaults: list[str] = []
    if num_visual_tokens is not None:
        config.scale_factor_for(num_visual_tokens)
        chosen = {"processor_kwargs": {"num_visual_tokens": num_visual_tokens}}
        defaults = ["--chat-template-kwargs", json.dumps(chosen)]
    register()

    from transformers.cli.transformers import app

    app(["serve", repo, *defaults, *arguments], prog_name="transformers")


def register() -> None:
    """Make `transformers serve`, in this process, know the model, and check requests before they reach it."""
    # Loading goes by the model type, the kinds of content by the class name; both look here, not into the Auto classes.
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[DeltaLlavaConfig.model_type] = DeltaLlavaForConditionalGeneration.__name__

    from transformers.cli.serving import server

    if not hasattr(server.build_server, "__wrapped__"):
        server.build_server = _with_checks(server.build_server)


def _with_checks(build_server: Any) -> Any:
    """`build_server`, whose application checks requests, and answers 400 with the reason to bad ones."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from huggingface_hub.errors import StrictDataclassError
    from jinja2 import TemplateError

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        logging.getLogger(__name__).warning("%s refused", request.url.path, exc_info=error)
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"The request lacks {reason}."
        return JSONResponse({"error": {"message": reason, "type": type(error).__name__, "code": 400}}, 400)

    @functools.wraps(build_server)
    def build(model_manager: Any, chat_handler: Any, **handlers: Any) -> Any:
        model_manager.load_model_and_processor = _with_limits(model_manager.load_model_and_processor)
        for handler, schema in (
            (chat_handler, ChatRequest),
            (handlers["completion_handler"], CompletionRequest),
            (handlers["response_handler"], ResponsesRequest),
        ):
            handler.handle_request = _with_preparation(handler, schema)
        application = build_server(model_manager, chat_handler, **handlers)
        for error in (*BAD_REQUEST, TemplateError, StrictDataclassError):
            application.add_exception_handler(error, refuse)
        return application

    return build


def _with_preparation(handler: Any, schema: type[Request]) -> Any:
    """The `handle_request` of `handler`, for requests that were checked and whose images were fetched."""
    handle, manager = handler.handle_request, handler.model_manager

    @functools.wraps(handle)
    async def handle_request(body: dict, request_id: str) -> Any:
        model, processor = manager.load_model_and_processor(manager.process_model_name(manager.force_model))
        return await handle(await prepare(body, schema, processor, max_prompt_tokens(model.config)), request_id)

    return handle_request


def _with_limits(load: Any) -> Any:
    """`load`, which returns model and processor, with prompts measured and answers kept to the model's positions."""

    @functools.wraps(load)
    def load_limited(*args: Any, **kwargs: Any) -> Any:
        model, processor = load(*args, **kwargs)
        if isinstance(processor, DeltaLlavaProcessor) and "apply_chat_template" not in vars(processor):
            limit = max_prompt_tokens(model.config)
            processor.apply_chat_template = _limit_rendering(processor, limit)  # type: ignore[method-assign]
            model.generate = _limit_generate(model.generate, limit)
        return model, processor

    return load_limited


def _limit_rendering(processor: DeltaLlavaProcessor, limit: int | None) -> Any:
    render = processor.apply_chat_template

    @functools.wraps(render)
    def apply_chat_template(conversation: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(conversation, list) and all(isinstance(message, dict) for message in conversation):
            conversation = to_conversation(conversation)
            check_conversation(conversation, {**kwargs, **(kwargs.get("processor_kwargs") or {})}, processor, limit)
        inputs = render(conversation, *args, **kwargs)
        if hasattr(inputs, "keys"):
            ids = inputs["input_ids"]
            check_prompt(ids.shape[-1] if hasattr(ids, "shape") else len(ids[0]), limit)
        return inputs

    return apply_chat_template


def _limit_generate(generate: Any, limit: int | None) -> Any:
    @functools.wraps(generate)
    def generate_within(*args: Any, tokenizer: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        if generation_config is not None:
            _limit_settings(generation_config, limit, kwargs["input_ids"].shape[-1])
        # Stop strings need the vocabulary; the server passes the processor.
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        return generate(*args, tokenizer=tokenizer, generation_config=generation_config, **kwargs)

    return generate_within


def _limit_settings(settings: Any, limit: int | None, num_tokens: int) -> None:
    """
    Keep the answer to a prompt of `num_tokens` within the positions, and beams to a number that fits into memory.

    Raises:
        DeltaLlavaError: too many beams or sequences, or no position is left.
    """
    for name in ("num_beams", "num_return_sequences"):
        number = getattr(settings, name, None)
        if isinstance(number, int) and number > MAX_SEQUENCES:
            raise DeltaLlavaError(f"{name}={number}: this server computes up to {MAX_SEQUENCES}.")
    if limit is not None:
        check_prompt(num_tokens + 1, limit)  # the first token of the answer needs a position
        longest = settings.max_new_tokens
        settings.max_new_tokens = min(limit - num_tokens, limit if longest is None else longest)
