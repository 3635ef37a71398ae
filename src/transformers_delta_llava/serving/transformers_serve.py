"""`transformers serve` with what it lacks for Delta-LLaVA: the model's name among those it knows, and 400 for a bad request."""

import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration


# What the server and the processor raise for a request that makes no sense. The server itself would answer 500.
BAD_REQUEST = (ValueError, TypeError, LookupError, AttributeError)


def serve(repo: str, arguments: Sequence[str] = (), num_visual_tokens: int | None = None) -> None:
    """
    Serve `repo` over the OpenAI API until the process is ended.

    The model's code is this package's, not the repo's.

    Args:
        repo: folder or Hub id of a Delta-LLaVA.
        arguments: further arguments of `transformers serve`, such as `["--port", "8001"]`.
        num_visual_tokens: visual tokens per image where a request does not say; by default the repo's.

    Raises:
        ValueError: a repo of another model type, a budget that the model does not have, or the server's dependencies
            are not installed.
        OSError: there is no such repo.
    """
    if not is_serve_available():
        raise ValueError("The server's dependencies are missing: pip install 'transformers-delta-llava[serve]'.")
    config = DeltaLlavaConfig.from_pretrained(repo)
    defaults: list[str] = []
    if num_visual_tokens is not None:
        config.scale_factor_for(num_visual_tokens)
        chosen = {"processor_kwargs": {"num_visual_tokens": num_visual_tokens}}
        defaults = ["--chat-template-kwargs", json.dumps(chosen)]
    register()

    from transformers.cli.transformers import app

    app(["serve", repo, *defaults, *arguments], prog_name="transformers")


def register() -> None:
    """Make `transformers serve`, in this process, know the model and answer 400 where a request is at fault."""
    # Loading goes by the model type, the kinds of content by the class name; both look here, not into the Auto classes.
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[DeltaLlavaConfig.model_type] = DeltaLlavaForConditionalGeneration.__name__

    from transformers.cli.serving import server

    if not hasattr(server.build_server, "__wrapped__"):
        server.build_server = _answer_400(server.build_server)


def _answer_400(build_server: Any) -> Any:
    """`build_server`, whose application answers 400 with the reason to what it would answer 500 to."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        logging.getLogger(__name__).warning("%s refused", request.url.path, exc_info=error)
        reason = str(error) or type(error).__name__
        if isinstance(error, LookupError):
            reason = f"The request lacks {reason}."
        return JSONResponse({"error": {"message": reason, "type": type(error).__name__, "code": 400}}, 400)

    @functools.wraps(build_server)
    def build(*args: Any, **kwargs: Any) -> Any:
        application = build_server(*args, **kwargs)
        for error in (*BAD_REQUEST, TemplateError):
            application.add_exception_handler(error, refuse)
        return application

    return build
