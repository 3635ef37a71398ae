"""`transformers serve` with what it lacks for Delta-LLaVA: every request is checked first."""

import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from ..analysis import load_config
from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.errors import DeltaLlavaError
from ..utils.prompts import check_prompt, max_prompt_tokens
from .requests import (
    ChatRequest,
    CompletionRequest,
    Request,
    ResponsesRequest,
    check_conversation,
    prepare,
    to_conversation,
)


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
    import fastapi
    from fastapi.responses import JSONResponse
    from huggingface_hub.errors import StrictDataclassError
    from jinja2 import TemplateError

    async def refuse(request: fastapi.Request, error: Exception) -> JSONResponse:
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
