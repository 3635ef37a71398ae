"""`num_visual_tokens="auto"`: the documented rule, and nothing but the image decides. And the words "low" and "high"."""

from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_delta_llava.processing import DeltaLlavaProcessor, load_chat_template
from transformers_delta_llava.processing.auto_budget_delta_llava import NOISE_LEVEL, detail_kept, pick_budget


BUDGETS = (576, 144, 64, 36, 16, 9, 4, 1)
SIDE = 48  # two pixels to a window of the largest budget


@pytest.fixture
def processor(make_processor: Any, make_image_processor: Any) -> DeltaLlavaProcessor:
    return make_processor(image_processor=make_image_processor(SIDE), chat_template=load_chat_template("vicuna_v1"))


def board(cells: int, low: int = 40, high: int = 200, side: int = SIDE) -> Image.Image:
    """A chessboard of cells x cells."""
    rows, columns = np.mgrid[:side, :side] * cells // side
    return Image.fromarray(np.where((rows + columns) % 2, low, high).astype(np.uint8)).convert("RGB")


def picks(processor: Any, images: list[Any], **kwargs: Any) -> list[int]:
    """What auto takes for each image, told by the placeholders."""
    kwargs = {"num_visual_tokens": "auto", **kwargs}
    batch = processor(images=images, text=["<image>"] * len(images), padding=True, **kwargs)
    counts = [list(row).count(processor.image_token_id) for row in batch["input_ids"]]
    assert counts == list(batch["num_visual_tokens"])
    return counts


def test_detail_is_that_of_the_formula() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    variances = {}
    for budget in (144, 36, 16, 9, 4, 1):
        side = isqrt(budget)
        windows = pixels.reshape(side, 48 // side, side, 48 // side, 3).mean((1, 3)).round()  # Pillow has 8 bits
        variances[budget] = windows.var((0, 1)).mean()
    expected = {b: 1 - max(0, variances[144] - v) / (variances[144] + NOISE_LEVEL**2) for b, v in variances.items()}
    assert detail_kept(Image.fromarray(pixels), list(variances)) == pytest.approx(expected, abs=0.02)


def test_the_smallest_budget_with_enough_detail_is_picked() -> None:
    details = {16: 1.0, 9: 0.7, 4: 0.8, 1: 0.1}
    picked = {share: pick_budget(details, share) for share in (2, 1, 0.81, 0.8, 0.7, 0.11, 0)}
    assert picked == {2: 16, 1: 16, 0.81: 16, 0.8: 4, 0.7: 4, 0.11: 4, 0: 1}


def test_finer_detail_gets_more_tokens(processor: Any) -> None:
    cells = {1: 1, 2: 4, 3: 9, 4: 16, 6: 36, 8: 64, 12: 144, 24: 576}
    assert picks(processor, [board(n) for n in cells]) == list(cells.values())


def test_blank_and_slow_images_get_few_tokens_however_long(processor: Any) -> None:
    noise = np.random.default_rng(0).normal(128, 3, (200, 200, 3)).round().astype(np.uint8)
    ramp = np.repeat(np.linspace(0, 255, 100).astype(np.uint8)[None], 100, 0)
    plain = [Image.new("RGB", size, "white") for size in ((50, 50), (100, 10), (10, 100), (5000, 2))]
    assert picks(processor, [*plain, Image.new("L", (5, 5)), noise, ramp]) == [1] * 6 + [4]


def test_contrast_and_brightness_hardly_count(processor: Any, make_image: Any) -> None:
    image = np.asarray(make_image(60, 60)).astype(np.float64)
    variants = [image, image / 2, image / 2 + 120, 255 - image]
    assert len(set(picks(processor, [variant.round().astype(np.uint8) for variant in variants]))) == 1


def test_less_detail_never_takes_more_tokens(processor: Any, make_image: Any) -> None:
    images = [make_image(60, 40), board(6), Image.new("RGB", (9, 9), "blue")]
    rows = [picks(processor, images, auto_min_detail=share) for share in (1, 0.9, 0.7, 0.5, 0.3, 0.1, 0)]
    assert all(more >= fewer for row, after in zip(rows, rows[1:]) for more, fewer in zip(row, after))
    assert rows[0][0] == 576 and rows[-1] == [1, 1, 1]
    assert len({row[0] for row in rows}) > 2


def test_the_form_of_an_image_does_not_matter(processor: Any, make_image: Any) -> None:
    image = make_image(70, 50)
    array = np.asarray(image)
    details = processor.image_detail([image, array, torch.from_numpy(array.transpose(2, 0, 1).copy()), array / 255])
    assert details == [details[0]] * 4 and details[0][576] == 1 and list(details[0]) == list(BUDGETS)
    assert processor.image_detail([[image], []]) == processor.image_detail(image) == details[:1]
    assert processor.image_detail([]) == []


def test_auto_mixes_with_numbers_and_rows_without_images(processor: Any) -> None:
    batch = processor(
        images=[[board(6)], [], [board(2), board(3)]],
        text=["<image>", "none", "<image> <image>"],
        num_visual_tokens=["auto", 144, "auto"],
        padding=True,
        return_tensors="pt",
    )
    assert batch["num_visual_tokens"].tolist() == [36, 144, 9] and batch["num_visual_tokens"].dtype == torch.int64
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [36, 0, 153]


def test_a_pick_is_announced_even_if_it_is_the_default(processor: Any) -> None:
    # Else the inputs of two images would have different names, and pipelines could not put them in a batch.
    assert processor(images=board(2), text="<image>", num_visual_tokens="auto")["num_visual_tokens"] == [4]


def test_auto_goes_through_chat_templates(processor: Any) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": board(6)}, {"type": "text", "text": "What?"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for kwargs in (
        {"num_visual_tokens": "auto", "auto_min_detail": 0},
        {"processor_kwargs": {"num_visual_tokens": ["auto"], "auto_min_detail": 0}},
        {"processor_kwargs": {"images_kwargs": {"num_visual_tokens": "auto", "auto_min_detail": 0}}},
    ):
        assert processor.apply_chat_template(chat, **options, **kwargs)["num_visual_tokens"].tolist() == [1]


def test_auto_can_be_the_default_of_a_processor(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)  # whose model has 4
    loaded = DeltaLlavaProcessor.from_pretrained(
        tmp_path, num_visual_tokens="auto", auto_min_detail=0.5, visual_token_budgets=[64, 16, 1]
    )
    assert loaded.image_seq_length == 4
    images = [board(4), board(8), board(1)]
    assert picks(loaded, images, num_visual_tokens=None) == [16, 64, 1]
    loaded.save_pretrained(tmp_path / "again")
    again = DeltaLlavaProcessor.from_pretrained(tmp_path / "again")
    assert (again.num_visual_tokens, again.auto_min_detail) == ("auto", 0.5)
    assert picks(again, images, num_visual_tokens=None) == [16, 64, 1]


def test_engines_plan_with_the_most_that_auto_can_pick(processor: Any) -> None:
    told = processor._get_num_multimodal_tokens(image_sizes=[(9, 9)] * 2, num_visual_tokens=["auto", 9])
    assert told["num_image_tokens"] == [576, 9] and told["num_image_patches"] == [1, 1]


@pytest.mark.parametrize("budgets", ["auto", ["auto"], "high", [4, 9]])
def test_a_default_that_is_no_number_needs_the_models_count(make_processor: Any, budgets: Any) -> None:
    with pytest.raises(ValueError, match="num_visual_tokens=.* needs image_seq_length"):
        make_processor(num_visual_tokens=budgets)
    assert make_processor(num_visual_tokens=budgets, image_seq_length=4).num_visual_tokens == budgets


@pytest.mark.parametrize("budgets, low, high", [(BUDGETS, 4, 576), ([36, 16, 9], 9, 36), ([1], 1, 1)])
def test_low_and_high(make_processor: Any, make_image: Any, budgets: Any, low: int, high: int) -> None:
    processor = make_processor(visual_token_budgets=budgets, num_visual_tokens=budgets[-1])
    assert processor.resolve_num_visual_tokens(["low", "high"]) == [low, high]
    if len(budgets) > 1:
        batch = processor(images=[make_image()] * 2, text="<image><image>", num_visual_tokens=["low", "high"])
        assert batch["num_visual_tokens"] == [low, high]
    told = processor._get_num_multimodal_tokens(image_sizes=[(9, 9)], num_visual_tokens="high")
    assert told["num_image_tokens"] == [high]
