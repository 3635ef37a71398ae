"""Chat templates of strangers: programs, which may never end."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import Environment, nodes

from .errors import DeltaLlavaError, explain_errors


MAX_CHARACTERS = 1_000_000
MAX_SECONDS = 5.0
# What transformers adds to the language: marks around what the assistant said.
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


def check_template(source: str, name: str) -> None:
    """Refuse a template that could not be stopped once it runs: powers are computed in one step of any length.

    Raises:
        DeltaLlavaError: one sentence that begins with `name`.
    """
    if len(source) > MAX_CHARACTERS:
        raise DeltaLlavaError(f"{name} has more than {MAX_CHARACTERS:,} characters.")
    with explain_errors(f"{name} is not a template"):
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))
    if tree.find(nodes.Pow):
        raise DeltaLlavaError(f"{name} computes powers (**), which no prompt needs and which may take for ever.")


def render_question(processor: Any, what: str) -> str:
    """The prompt for a question about an image, by the template of a repo, which may be a stranger's.

    Args:
        processor: of the repo.
        what: what errors call its template.

    Raises:
        DeltaLlavaError: a template that runs too long, or that `check_template` refuses.
        ValueError: whatever else it raises.
    """
    template = processor.chat_template
    for source in template.values() if isinstance(template, dict) else [template]:
        check_template(str(source or ""), what)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    with time_limit(what):
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    """Stops Python code in the block, in this thread, that takes more than `MAX_SECONDS` of the processor's time.

    Raises:
        DeltaLlavaError: saying that `what` takes too long.
    """
    deadline = time.thread_time() + MAX_SECONDS  # not the wall clock: the machine may be busy

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > deadline:
            raise DeltaLlavaError(f"{what} takes more than {MAX_SECONDS:g} seconds.")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)
