"""Rows of training data as messages of a chat template, and messages as tokens with labels.

A row in LLaVA's format is `{"id", "image": name or list of names, "conversations": [{"from", "value"}, ...]}`, with
`<image>` in the human's values. A row of a Hugging Face dataset is `{"messages": [{"role", "content"}], "images"}`.
Either may have a `system` text. In the messages the images of a turn come before its text, as in LLaVA's training.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jinja2
import torch
from PIL import Image
from pydantic import AfterValidator, AliasChoices, BaseModel, Field, ValidationError

from ..processing import DeltaLlavaProcessor
from ..utils.errors import RowError, one_line


IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Keys of other formats: a row that has one would be trained on only in part.
UNSUPPORTED = ("tools", "video", "videos", "audio", "audios")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class _Text(BaseModel):
    type: Literal["text"]
    text: Text


class _Image(BaseModel):
    """A placeholder; the row's list of images says which image it is."""

    type: Literal["image"]
    image: None = None
    url: None = None
    path: None = None


class _Turn(BaseModel):
    speaker: Literal["human", "user", "gpt", "assistant", "system"] = Field(
        validation_alias=AliasChoices("from", "role")
    )
    content: Text | list[Annotated[_Text | _Image, Field(discriminator="type")]] = Field(
        validation_alias=AliasChoices("value", "content")
    )

    def parse(self) -> tuple[str, str, int]:
        """Role, text without placeholders, and number of images.

        Raises:
            RowError: an image in a turn that is not the user's.
        """
        role, text, count = ROLES[self.speaker], self.content, 0
        if isinstance(text, list):
            count = sum(item.type == "image" for item in text)
            text = "\n".join(item.text for item in text if isinstance(item, _Text))
        placeholders = text.count(IMAGE_TOKEN)
        if count + placeholders and role != "user":
            raise RowError(f"it has {IMAGE_TOKEN} in a turn of the {role}")
        if placeholders:
            text = text.replace(IMAGE_TOKEN, "").strip()
        return role, text, count + placeholders


class _Row(BaseModel):
    system: Text | None = None
    conversations: list[_Turn] | None = None
    messages: list[_Turn] | None = None


def image_names(row: dict[str, Any]) -> list[Any]:
    """The images of a row: names, or PIL images."""
    given = [row[key] for key in ("image", "images") if row.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise RowError("it has both image and images")
    images = given[0] if given else []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def to_messages(row: Any, images: Sequence[Any] | None = None) -> list[dict[str, Any]]:
    """
    The messages of a row, with images as `{"type": "image", "image": ...}`.

    As in LLaVA, a first turn of the assistant is dropped.

    Args:
        row: in one of the two formats.
        images: replacements for the row's images, in order.

    Raises:
        RowError: no conversation, no answer, an unknown role, a number of images that differs from that of the
            placeholders, or a value of a wrong type.
    """
    if not isinstance(row, dict):
        raise RowError(f"it is of type {type(row).__name__}, not an object")
    for key in UNSUPPORTED:
        if row.get(key):
            raise RowError(f"it has {key}, which cannot be trained on")
    try:
        parsed = _Row.model_validate(row)
    except ValidationError as error:
        raise RowError(one_line(error)) from error
    if parsed.conversations and parsed.messages:
        raise RowError("it has both conversations and messages")
    turns = [turn.parse() for turn in parsed.conversations or parsed.messages or []]
    if not turns:
        raise RowError("it has no conversation")
    if parsed.system:
        if turns[0][0] == "system":
            raise RowError("it has a system text and a system turn")
        turns.insert(0, ("system", parsed.system, 0))
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
    Refuse a conversation that the `plain` template cannot render.

    Raises:
        RowError: it is not one question with an image and its answer.
    """
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) > 2 or all(item["type"] == "text" for item in turns[0]["content"]):
        raise RowError("it is not a caption of an image, as the plain template requires")


def _check_turns(turns: list[tuple[str, str, int]]) -> None:
    for index, (role, text, _) in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            raise RowError(f"turn {index + 1} is from the {role} instead of the {expected}")
        if role == "assistant" and not text.strip():
            raise RowError("it has an empty answer")
    if len(turns) < 2:
        raise RowError("it has no answer")


WORD_MARK = "\u2581"
IGNORED = -100  # label of a token without loss, as everywhere in transformers


class ConversationEncoder:
    """
    Turns messages into `input_ids`, `labels` and `pixel_values`.

    Labels follow the chat template's generation mask: the assistant's answers and the tokens that end them.

    Args:
        processor: its chat template must mark answers with `{% generation %}`.
        max_length: tokens to which a conversation is truncated, never within an image.
        pad_images: pad images to squares; by default as the processor does.
    """

    def __init__(self, processor: DeltaLlavaProcessor, max_length: int, pad_images: bool | None = None):
        self.processor = processor
        self.max_length = max_length
        self.options: dict[str, Any] = {} if pad_images is None else {"do_pad": pad_images}

    def __call__(self, messages: list[dict[str, Any]], budget: int) -> dict[str, Any]:
        """
        Encode a conversation at `budget` visual tokens per image.

        Returns:
            `input_ids` and `labels` (tokens,), int64; `pixel_values` (images, 3, height, width), float32, or None.

        Raises:
            RowError: an unusable image, a conversation that the template refuses, or no answer within `max_length`.
        """
        try:
            inputs = self.processor.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                # No tensors yet: computing the assistant mask from one takes longer than everything else.
                processor_kwargs={"num_visual_tokens": budget, **self.options},
            )
        except (jinja2.TemplateError, ValueError, OSError) as error:
            raise RowError(" ".join(str(error).split())) from error
        input_ids = torch.tensor(inputs["input_ids"][0])
        mask = torch.as_tensor(inputs["assistant_masks"]).reshape(-1).bool()
        labels = input_ids.masked_fill(~(mask | self._word_marks(input_ids, mask)), IGNORED)
        length, images = self._truncate(input_ids, budget)
        if not (labels[1:length] != IGNORED).any():
            raise RowError(f"no answer is within its first {self.max_length} tokens")
        return {
            "input_ids": input_ids[:length],
            "labels": labels[:length],
            "pixel_values": torch.stack(list(map(torch.as_tensor, inputs["pixel_values"][:images])))
            if images
            else None,
        }

    def _word_marks(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Where SentencePiece's word mark is a token of its own between an image and an answer, as in captions."""
        alone = input_ids == self.processor.tokenizer.convert_tokens_to_ids(WORD_MARK)
        behind_image = (input_ids == self.processor.image_token_id).roll(1)
        return alone & behind_image & mask.roll(-1)

    def _truncate(self, input_ids: torch.Tensor, budget: int) -> tuple[int, int]:
        """How many tokens, and how many images, to keep."""
        starts = (input_ids == self.processor.image_token_id).nonzero().flatten()[::budget].tolist()
        length = min(len(input_ids), self.max_length)
        kept = [start for start in starts if start + budget <= length]
        if len(kept) < len(starts):
            length = min(length, starts[len(kept)])
        return length, len(kept)

    def blank_image(self) -> torch.Tensor:
        """(1, 3, height, width): a black image, preprocessed."""
        return self.processor.image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
