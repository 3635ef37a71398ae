"""Processor and model together: what a batch answers, each of its prompts answers by itself."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from tests.tiny import noise, tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


PROMPTS = ["what<image>isit", "no_image_here", "<image>and<image>differ?", "<image>!"]
SINGLE_IMAGES = [
    Image.new("RGB", (24, 24), "red"),
    noise(24, 24, 0),
    Image.fromarray(np.kron(np.eye(3, dtype=np.uint8)[::-1] * 200, np.ones((8, 8), np.uint8))),
]
IMAGES = [[noise(30, 20, 0)], [], [noise(20, 30, 1), noise(24, 24, 2)], [noise(100, 1, 3)]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(tiny_config(scale_factor=4)).eval()


@pytest.mark.parametrize(
    "budgets",
    [None, [36, 1, 144, 4], "auto", ["auto", 1, "auto", 16]],
    ids=["default budget", "mixed budgets", "auto", "auto and numbers"],
)
@torch.no_grad()
def test_batch_of_four_equals_four_single_runs(model, budgets):
    processor = tiny_processor(model.config)
    batch = processor(text=PROMPTS, images=IMAGES, num_visual_tokens=budgets, padding=True, return_tensors="pt")
    logits = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]

    seen = 0
    for row, (prompt, images) in enumerate(zip(PROMPTS, IMAGES)):
        own = budgets[seen : seen + len(images)] if isinstance(budgets, list) else budgets
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
        inputs = processor(text="<image>", images=noise(9, 9, 0), num_visual_tokens=budget, return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == budget
        assert len(model(**inputs).image_outputs.pooler_output[0]) == budget


def test_auto_gives_images_of_one_batch_what_each_needs(model):
    processor = tiny_processor(model.config)
    images = [Image.new("RGB", (24, 24), "red"), noise(24, 24, 0)]
    batch = processor(
        images=images, text=["<image>", "<image>"], num_visual_tokens="auto", padding=True, return_tensors="pt"
    )
    assert batch["num_visual_tokens"].tolist() == [1, 144]
    assert sum(map(len, model(**batch).image_outputs.pooler_output)) == 145


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}])
@torch.no_grad()
def test_beams_of_a_mixed_batch_equal_single_runs(model, options):
    processor = tiny_processor(model.config)
    rows = [SINGLE_IMAGES[:1], [], SINGLE_IMAGES[1:], SINGLE_IMAGES[:1]]
    batch = processor(text=PROMPTS, images=rows, num_visual_tokens="auto", padding=True, return_tensors="pt")
    assert batch["num_visual_tokens"].tolist() == [1, 144, 9, 1]
    copies = options.get("num_return_sequences", 1)
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False, **options)
    for row, (text, images) in enumerate(zip(PROMPTS, rows)):
        single = processor(text=text, images=images or None, num_visual_tokens="auto", return_tensors="pt")
        alone = model.generate(**single, max_new_tokens=4, do_sample=False, **options)
        assert torch.equal(tokens[row * copies : (row + 1) * copies, -4:], alone[:, -4:])


@pytest.mark.parametrize("budget", ["auto", "36", 7])
def test_the_model_takes_numbers_of_its_grid_only(model, budget):
    inputs = tiny_processor(model.config)(
        text="<image>", images=noise(9, 9, 0), num_visual_tokens=1, return_tensors="pt"
    )
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="num_visual_tokens="):
            run(**{**inputs, "num_visual_tokens": budget})


@pytest.mark.parametrize("budget", [4, "auto", ["auto"]])
def test_a_pipeline_takes_budgets(model, budget):
    processor = tiny_processor(model.config)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    chat = [{"role": "user", "content": [{"type": "image", "image": noise(24, 24, 0)}, {"type": "text", "text": "?"}]}]
    expected = 4 if budget == 4 else 144
    answers = []
    for options in ({"num_visual_tokens": budget}, {"processor_kwargs": {"num_visual_tokens": budget}}):
        answers += pipe(text=chat, **options, generate_kwargs={"max_new_tokens": 3, "do_sample": False})
    hook.remove()
    assert seen == [expected, expected]
    assert answers[0] == answers[1]

    # Images that get different numbers, one of them the default, in one batch; each answers as it does by itself.
    chats = [[{"role": "user", "content": [{"type": "image", "image": image}]}] for image in SINGLE_IMAGES]
    budgets = [processor(images=image, num_visual_tokens=budget).get("num_visual_tokens") for image in SINGLE_IMAGES]
    assert budgets == [[4]] * 3 if budget == 4 else budgets == [[1], [144], [9]]
    options = {"processor_kwargs": {"num_visual_tokens": budget}, "return_full_text": False}
    batched = pipe(text=chats, batch_size=3, **options, generate_kwargs={"max_new_tokens": 3, "do_sample": False})
    for one, answer in zip(chats, batched):
        assert pipe(text=one, **options, generate_kwargs={"max_new_tokens": 3, "do_sample": False}) == answer
