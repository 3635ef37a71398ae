"""A conversation as model inputs, with labels on what the assistant says and nowhere else."""

from typing import Any

import jinja2
import torch
from PIL import Image

from ..processing import DeltaLlavaProcessor
from .errors import RowError


WORD_MARK = "\u2581"
IGNORED = -100  # label of a token without a loss, as everywhere in transformers


class ConversationEncoder:
    """
    Turns messages into `input_ids`, `labels` and `pixel_values`.

    Labels are where the chat template's generation mask is: the assistant's words and what ends them.

    Args:
        processor: its chat template is used; it must mark what the assistant says with `{% generation %}`.
        max_length: tokens that a conversation is cut to, never within an image.
        pad_images: pad images to squares; as the processor does by default.
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
            RowError: an image that cannot be used, a conversation that the template refuses, or no answer within
                `max_length`.
        """
        try:
            inputs = self.processor.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                # No tensors yet: making the assistant mask from one takes longer than all the rest.
                processor_kwargs={"num_visual_tokens": budget, **self.options},
            )
        except (jinja2.TemplateError, ValueError, OSError) as error:
            raise RowError(" ".join(str(error).split())) from error
        input_ids = torch.tensor(inputs["input_ids"][0])
        mask = torch.as_tensor(inputs["assistant_masks"]).reshape(-1).bool()
        labels = input_ids.masked_fill(~(mask | self._word_marks(input_ids, mask)), IGNORED)
        length, images = self._cut(input_ids, budget)
        if not (labels[1:length] != IGNORED).any():
            raise RowError(f"no answer is within its first {self.max_length} tokens")
        return {
            "input_ids": input_ids[:length],
            "labels": labels[:length],
            "pixel_values": torch.stack([torch.as_tensor(p) for p in inputs["pixel_values"][:images]])
            if images
            else None,
        }

    def _word_marks(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Where SentencePiece's word mark stands alone between an image and the answer that it opens, as in a caption."""
        alone = input_ids == self.processor.tokenizer.convert_tokens_to_ids(WORD_MARK)
        behind_image = (input_ids == self.processor.image_token_id).roll(1)
        return alone & behind_image & mask.roll(-1)

    def _cut(self, input_ids: torch.Tensor, budget: int) -> tuple[int, int]:
        """How many tokens, and how many images, to keep."""
        starts = (input_ids == self.processor.image_token_id).nonzero().flatten()[::budget].tolist()
        length = min(len(input_ids), self.max_length)
        kept = [start for start in starts if start + budget <= length]
        if len(kept) < len(starts):
            length = min(length, starts[len(kept)])
        return length, len(kept)

    def blank_image(self) -> torch.Tensor:
        """(1, 3, height, width): a black picture as the image processor makes it."""
        picture = Image.new("RGB", (64, 64))
        return self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
