"""Chat templates and prompts: bounded in time and length."""

import re
import sys
import time
from collections.abc import Iterable, Iterator
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


# A text is measured in pieces of so many characters per token that there is room for.
CHARACTERS = 8


def max_prompt_tokens(config: Any) -> int | None:
    """
    The positions of a model's language model: how many tokens, visual ones included, a prompt may have; None if it does not say.

    Scaled position embeddings count: by `factor` more than the model was trained for.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor, trained = rope.get("factor"), rope.get("original_max_position_embeddings")
    if not isinstance(factor, (int, float)):
        return positions
    return max(positions, int(factor * (trained if isinstance(trained, int) else positions)))


def check_texts(texts: Iterable[str], tokenizer: Any, limit: int | None) -> None:
    """
    Refuse `texts` that together have more than `limit` tokens, without encoding much more than these.

    Raises:
        DeltaLlavaError: they are longer, or hold half a character.
    """
    if limit is None:
        return
    room = limit + 1  # cutting a text in pieces can make a token of two more, and special tokens are not counted
    for text in texts:
        for start in range(0, len(text), CHARACTERS * limit):
            piece = text[start : start + CHARACTERS * limit]
            if not piece.isascii() and any("\ud800" <= character <= "\udfff" for character in piece):
                raise DeltaLlavaError(
                    "The prompt holds half a character (a lone surrogate), which no tokenizer reads."
                )
            room -= len(tokenizer.encode(piece, add_special_tokens=False)) - (start > 0)
            if room < 0:
                raise DeltaLlavaError(
                    f"The prompt is too long: it has more than {limit:,} tokens, the positions of the model; shorten it."
                )


def check_prompt(num_tokens: int, limit: int | None) -> None:
    """
    Refuse an encoded prompt of `num_tokens`, text and visual tokens, where that is more than `limit`.

    Raises:
        DeltaLlavaError: it is longer.
    """
    if limit is not None and num_tokens > limit:
        raise DeltaLlavaError(
            f"The prompt is too long: it has {num_tokens:,} tokens, and the model has {limit:,} positions; shorten it, or "
            "use fewer visual tokens."
        )
