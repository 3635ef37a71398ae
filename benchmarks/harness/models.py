"""A Delta-LLaVA and transformers' own LLaVA around one and the same tower and language model, with random weights."""

from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from benchmarks.shapes import model_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


LLAVA = "LLaVA"


def build_pair(
    shape: str, device: str, dtype: torch.dtype, **fields: Any
) -> tuple[DeltaLlavaForConditionalGeneration, LlavaForConditionalGeneration]:
    """Both in evaluation mode; all but the projectors are the same modules, so the pair needs the memory of one.

    `fields` change the config of the shape.
    """
    config = model_config(shape, **fields)
    ours = build(lambda: DeltaLlavaForConditionalGeneration(config), device, dtype)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=config.vision_config,
                text_config=config.text_config,
                image_token_id=config.image_token_id,
            )
        )
    projector = llava.model.multi_modal_projector.to_empty(device=device).to(dtype)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    llava.model.vision_tower, llava.model.language_model = ours.model.vision_tower, ours.model.language_model
    llava.lm_head = ours.lm_head
    return ours, llava.eval()


def build(make, device: str, dtype: torch.dtype):
    """What `make` returns, made on the device and in the dtype, in evaluation mode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(before)
    return model.to(device).eval()


def make_inputs(model, budget: int, text_tokens: int, batch: int) -> dict[str, torch.Tensor]:
    """One image and `text_tokens` random tokens a row, for either model of a pair."""
    config = model.config
    device, generator = model.device, torch.Generator().manual_seed(budget)
    text = torch.randint(3, config.image_token_id, (batch, text_tokens), generator=generator)
    images = torch.full((batch, budget), config.image_token_id)
    side = config.vision_config.image_size
    ids = torch.cat([text[:, :4], images, text[:, 4:]], dim=1).to(device)
    pixels = torch.randn(batch, 3, side, side, generator=generator).to(device, model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
