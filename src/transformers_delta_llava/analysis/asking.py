"""A picture and a question, as the model takes them."""

from typing import Any

from PIL import Image

from ..processing import DeltaLlavaProcessor


def encode_question(
    processor: DeltaLlavaProcessor,
    image: Image.Image,
    prompt: str,
    num_visual_tokens: int | str | None = None,
    auto_max_loss: float | None = None,
) -> Any:
    """
    Inputs, a batch of one, of one turn in the processor's chat template: the picture, then the prompt.

    Args:
        processor: of any repo.
        image: any picture.
        prompt: what to ask.
        num_visual_tokens: a budget or `"auto"`; the processor's default when `None`.
        auto_max_loss: what `"auto"` may lose; the processor's default when `None`.

    Raises:
        ValueError: a budget that the processor does not have, or a picture that cannot be used.
    """
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    options = {"num_visual_tokens": num_visual_tokens, "auto_max_loss": auto_max_loss, "return_tensors": "pt"}
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs=options,
    )


def count_visual_tokens(processor: DeltaLlavaProcessor, inputs: Any) -> int:
    """Visual tokens of the one picture in `inputs`."""
    return int((inputs["input_ids"] == processor.image_token_id).sum())
