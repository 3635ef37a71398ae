"""Processor and model together: what a batch answers, each of its prompts answers alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PROMPTS = ["what<image>isit", "no_picture_here", "<image>and<image>differ?", "<image>!"]
IMAGES = [[picture(30, 20, 0)], [], [picture(20, 30, 1), picture(24, 24, 2)], [picture(100, 1, 3)]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(tiny_config(scale_factor=4)).eval()


@pytest.mark.parametrize("budgets", [None, [36, 1, 144, 4]], ids=["default budget", "mixed budgets"])
@torch.no_grad()
def test_batch_of_four_equals_four_single_runs(model, budgets):
    processor = tiny_processor(model.config)
    batch = processor(text=PROMPTS, images=IMAGES, num_visual_tokens=budgets, padding=True, return_tensors="pt")
    logits = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]

    seen = 0
    for row, (prompt, images) in enumerate(zip(PROMPTS, IMAGES)):
        own = budgets and budgets[seen : seen + len(images)]
        seen += len(images)
        single = processor(text=prompt, images=images or None, num_visual_tokens=own, return_tensors="pt")
        alone = model(**single).logits[0]
        torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=1e-4, rtol=0)
        generated = model.generate(**single, max_new_tokens=8, do_sample=False)[0, single["input_ids"].shape[1] :]
        assert torch.equal(tokens[row], generated)


def test_placeholders_are_what_the_model_fills(model):
    """The processor's count is data that came from the config; here it meets what the projector makes."""
    processor = tiny_processor(model.config)
    for budget in model.config.visual_token_budgets:
        inputs = processor(text="<image>", images=picture(9, 9, 0), num_visual_tokens=budget, return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == budget
        assert model(**inputs).image_hidden_states.shape[0] == budget
