"""How long prompts may be."""

from collections.abc import Iterable
from typing import Any

from .errors import DeltaLlavaError


# A text is measured in pieces of so many characters per token that there is room for.
CHARACTERS = 8


def max_prompt_tokens(config: Any) -> int | None:
    """The positions of a model's language model: how many tokens, visual ones included, a prompt may have; None if it does not say.

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
    """Refuse `texts` that together have more than `limit` tokens, without encoding much more than these.

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
    """Refuse an encoded prompt of `num_tokens`, text and visual tokens, where that is more than `limit`.

    Raises:
        DeltaLlavaError: it is longer.
    """
    if limit is not None and num_tokens > limit:
        raise DeltaLlavaError(
            f"The prompt is too long: it has {num_tokens:,} tokens, and the model has {limit:,} positions; shorten it, or "
            "use fewer visual tokens."
        )
