"""Rows of training data, and what makes one unusable.

A row in LLaVA's format is `{"id", "image": name or list of names, "conversations": [{"from", "value"}, ...]}`, with
`<image>` in the human's values. A row of a Hugging Face dataset is `{"messages": [{"role", "content"}], "images"}`.
Both become messages of a chat template: each turn's images first, then its text, as LLaVA's own training moves them.
"""

from collections.abc import Sequence
from typing import Any


IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RowError(ValueError):
    """A row that cannot be trained on; the message is the reason, without the row's name."""


def image_names(row: dict[str, Any]) -> list[Any]:
    """The images of a row: names, or pictures."""
    images = row.get("image", row.get("images"))
    if images is None or images == "":
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def to_messages(row: Any, images: Sequence[Any] | None = None) -> list[dict[str, Any]]:
    """
    The conversation of a row, its images as content items `{"type": "image", "image": ...}`.

    A first turn of the assistant's that answers nothing is dropped, as LLaVA does.

    Args:
        row: in one of the two formats.
        images: what to put in place of the row's images, in order.

    Raises:
        RowError: no conversation, no answer, an unknown role, or images that do not fit the placeholders.
    """
    if not isinstance(row, dict):
        raise RowError(f"it is of type {type(row).__name__}, not an object")
    turns = [_turn(turn) for turn in row.get("conversations") or row.get("messages") or []]
    if not turns:
        raise RowError("it has no conversation")
    opening = 1 if turns[0][0] == "system" else 0
    if len(turns) > opening and turns[opening][0] == "assistant":
        del turns[opening]
    _check_turns(turns[opening:])
    given = image_names(row) if images is None else list(images)
    wanted = sum(count for _, _, count in turns)
    if wanted != len(given):
        raise RowError(f"it has {wanted} {IMAGE_TOKEN} and {len(given)} images")
    rest = iter(given)
    return [
        {
            "role": role,
            "content": [
                *({"type": "image", "image": next(rest)} for _ in range(count)),
                {"type": "text", "text": text},
            ],
        }
        for role, text, count in turns
    ]


def check_caption(messages: list[dict[str, Any]]) -> None:
    """
    Refuse what the `plain` format has no place for.

    Raises:
        RowError: a conversation that is not one question with an image, and its answer.
    """
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) > 2 or all(item["type"] == "text" for item in turns[0]["content"]):
        raise RowError("it is no caption of an image, which the plain format is for")


def _turn(turn: Any) -> tuple[str, str, int]:
    """Role, text without placeholders, and number of images."""
    if not isinstance(turn, dict):
        raise RowError("a turn of its conversation is not an object")
    name, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if name not in ROLES:
        raise RowError(f"it has a turn from {name!r}; there are {', '.join(ROLES)}")
    count = 0
    if isinstance(content, (list, tuple)):
        kinds = [item.get("type") if isinstance(item, dict) else item for item in content]
        if set(kinds) - {"image", "text"}:
            raise RowError("it has content that is neither text nor image")
        count = kinds.count("image")
        content = "\n".join(str(item["text"]) for item in content if item["type"] == "text")
    if not isinstance(content, str):
        raise RowError("a turn of its conversation has no text")
    role = ROLES[name]
    found = content.count(IMAGE_TOKEN)
    if count + found and role != "user":
        raise RowError(f"it has {IMAGE_TOKEN} in a turn of the {role}")
    if found:
        content = content.replace(IMAGE_TOKEN, "").strip()
    return role, content, count + found


def _check_turns(turns: list[tuple[str, str, int]]) -> None:
    for index, (role, text, _) in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            raise RowError(f"turn {index + 1} is from the {role}, where the {expected} must speak")
        if role == "assistant" and not text.strip():
            raise RowError("it has an empty answer")
    if len(turns) < 2:
        raise RowError("it has no answer")
