"""`transformers serve` with what it lacks for Delta-LLaVA: the model's name, limits for requests, and 400 for a bad one."""

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
from ..utils.prompt_length import check_prompt, max_prompt_tokens
from .requests import ChatRequest, CompletionRequest, ResponsesRequest, check_conversation, prepare, to_conversation


# What the server and the processor raise for a request that makes no sense. The server itself would answer 500.
BAD_REQUEST = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
# Answers that one request may have computed side by side: beams, or several sequences.
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
        ValueError: there is no such repo, it is of another model type, it does not have this budget, or the server's
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
        server.build_server = _checking(server.build_server)


def _checking(build_server: Any) -> Any:
    """`build_server`, whose application checks requests, and answers 400 with the reason to those that are at fault."""
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
    def build(model_manager: Any, chat_handler: Any, **parts: Any) -> Any:
        model_manager.load_model_and_processor = _guarding(model_manager.load_model_and_processor)
        kinds = {"completion_handler": CompletionRequest, "response_handler": ResponsesRequest}
        chat_handler.handle_request = _prepared(chat_handler, ChatRequest)
        for name, kind in kinds.items():
            parts[name].handle_request = _prepared(parts[name], kind)
        application = build_server(model_manager, chat_handler, **parts)
        for error in (*BAD_REQUEST, TemplateError, StrictDataclassError):
            application.add_exception_handler(error, refuse)
        return application

    return build


def _prepared(handler: Any, kind: Any) -> Any:
    """The `handle_request` of `handler`, for requests that were checked and whose images were fetched."""
    handle, manager = handler.handle_request, handler.model_manager

    @functools.wraps(handle)
    async def handle_request(body: dict, request_id: str) -> Any:
        model, processor = manager.load_model_and_processor(manager.process_model_name(manager.force_model))
        body = await prepare(body, kind, processor, max_prompt_tokens(model.config))
        return await handle(body, request_id)

    return handle_request


def _guarding(load: Any) -> Any:
    """`load`, which gives model and processor, such that prompts are measured and generation keeps to the positions."""

    @functools.wraps(load)
    def load_guarded(*args: Any, **kwargs: Any) -> Any:
        model, processor = load(*args, **kwargs)
        if isinstance(processor, DeltaLlavaProcessor) and "apply_chat_template" not in vars(processor):
            _guard(model, processor)
        return model, processor

    return load_guarded


def _guard(model: Any, processor: DeltaLlavaProcessor) -> None:
    limit = max_prompt_tokens(model.config)
    render, generate = processor.apply_chat_template, model.generate

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

    @functools.wraps(generate)
    def generate_within(*args: Any, tokenizer: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        if generation_config is not None:
            _limit_generation(generation_config, limit, kwargs["input_ids"].shape[-1])
        # Stop strings need the vocabulary; the server hands the processor over.
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        return generate(*args, tokenizer=tokenizer, generation_config=generation_config, **kwargs)

    processor.apply_chat_template = apply_chat_template  # type: ignore[method-assign]
    model.generate = generate_within


def _limit_generation(settings: Any, limit: int | None, num_tokens: int) -> None:
    """
    Keep the answer to a prompt of `num_tokens` within the positions, and beams to a number that does not end the server.

    Raises:
        DeltaLlavaError: too many beams or sequences, or no position is left.
    """
    for name in ("num_beams", "num_return_sequences"):
        number = getattr(settings, name, None)
        if isinstance(number, int) and number > MAX_SEQUENCES:
            raise DeltaLlavaError(f"{name}={number}: this server computes up to {MAX_SEQUENCES}.")
    if limit is not None:
        check_prompt(num_tokens + 1, limit)  # the first token of the answer has to have a position
        longest = settings.max_new_tokens
        settings.max_new_tokens = min(limit - num_tokens, limit if longest is None else longest)
