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


@contextmanager
def time_limit(what: str, seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Stops Python code in the block, in this thread, that takes longer.

    Raises:
        DeltaLlavaError: saying that `what` takes too long.
    """
    deadline = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > deadline:
            raise DeltaLlavaError(f"{what} takes more than {seconds:g} seconds.")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)
