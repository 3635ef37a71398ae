"""A picture and a question, as the model takes them, and the tokens of its answer."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from PIL import Image

from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.prompt_length import check_prompt, check_texts


def encode_question(
    processor: DeltaLlavaProcessor,
    image: Image.Image,
    prompt: str,
    num_visual_tokens: int | str | None = None,
    auto_max_loss: float | None = None,
    max_tokens: int | None = None,
) -> Any:
    """
    Inputs, a batch of one, of one turn in the processor's chat template: the picture, then the prompt.

    Args:
        processor: of any repo.
        image: any picture.
        prompt: what to ask.
        num_visual_tokens: a budget or `"auto"`; the processor's default when `None`.
        auto_max_loss: what `"auto"` may lose; the processor's default when `None`.
        max_tokens: of the prompt with its visual tokens, from `max_prompt_tokens`; any number when `None`.

    Raises:
        ValueError: a budget that the processor does not have, an image that cannot be used, or a prompt that is longer.
    """
    check_texts([prompt], processor.tokenizer, max_tokens)
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    options = {"num_visual_tokens": num_visual_tokens, "auto_max_loss": auto_max_loss, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs=options,
    )
    check_prompt(inputs["input_ids"].shape[1], max_tokens)
    return inputs


def count_visual_tokens(processor: DeltaLlavaProcessor, inputs: Any) -> int:
    """Visual tokens of the one picture in `inputs`."""
    return int((inputs["input_ids"] == processor.image_token_id).sum())


def find_token(processor: DeltaLlavaProcessor, ids: Sequence[int], token: int | str, budget: int) -> int:
    """
    Position among the `ids` of the answer at a `budget`: `token` itself, or where its text starts.

    Raises:
        ValueError: the answer is empty, or has no such token.
    """
    if not ids:
        raise ValueError(f"The answer with {budget} visual tokens is empty: there is no token to explain.")
    if isinstance(token, int) and 0 <= token < len(ids):
        return token
    if isinstance(token, str):
        wanted = token.strip()
        for start in range(len(ids)):
            said = token_text(processor, ids[start : start + 1])
            for stop in range(start + 2, len(ids) + 1):  # a word may be in several pieces
                if not said or said == wanted or len(said.rstrip("\ufffd")) > len(wanted):
                    break  # a character of which a piece holds a part reads as U+FFFD
                said = token_text(processor, ids[start:stop])
            if said and said == wanted:
                return start
    pieces = ", ".join(f"{place} {token_text(processor, [index])!r}" for place, index in enumerate(ids[:20]))
    more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
    raise ValueError(
        f"token={token!r}: the answer with {budget} visual tokens does not have it; its tokens are {pieces}{more}."
    )


def token_text(processor: DeltaLlavaProcessor, ids: Sequence[int]) -> str:
    """What ids read, special tokens among them, without blanks around it."""
    return str(processor.decode(list(ids))).strip()


@torch.no_grad()
def answer_ids(model: DeltaLlavaForConditionalGeneration, inputs: Any, max_new_tokens: int) -> list[int]:
    """Ids of the greedy answer to the inputs of one question, up to the token that ends it."""
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=False
    )
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return list(takewhile(lambda index: index not in ends, output[0, inputs["input_ids"].shape[1] :].tolist()))
