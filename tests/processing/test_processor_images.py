"""Pixel values are those of the authors' code, for images of every size, in little time and memory."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from transformers_delta_llava.processing import image_utils_delta_llava


SIZES = [(40, 30), (30, 40), (33, 32), (28, 28), (64, 64), (1, 1), (1, 7), (500, 3), (3, 501), (777, 1000)]


def on_a_square(image: Image.Image, mean: Any = OPENAI_CLIP_MEAN) -> Image.Image:
    """Source: the padding of the authors' code: mean colour, centred, offset rounded down."""
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(channel * 255) for channel in (mean if np.ndim(mean) else [mean] * 3)]
    square[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(square)


@pytest.mark.parametrize("size", SIZES)
def test_pixel_values_are_those_of_the_released_code(processor: Any, make_image: Any, size: tuple[int, int]) -> None:
    image = make_image(*size)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28)
    assert pixels.dtype == torch.float32
    square = on_a_square(image)
    assert torch.equal(pixels, processor.image_processor(square, return_tensors="pt")["pixel_values"])
    resized = np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC)) / 255
    expected = (resized - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
    np.testing.assert_allclose(pixels[0].numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_the_padding_has_clips_mean_colour_and_the_smaller_half_comes_first(raw: Any, make_image: Any) -> None:
    image = make_image(4, 7)
    pixels = raw(image)
    assert pixels.shape == (7, 7, 3)
    assert (pixels[:, :1] == (122, 116, 104)).all()
    assert (pixels[:, 1:5] == np.asarray(image)).all()
    assert (pixels[:, 5:] == (122, 116, 104)).all()


@pytest.mark.parametrize("resample", list(Image.Resampling))
@pytest.mark.parametrize("size", [(100, 90), (90, 101), (7, 250)])
def test_working_in_strips_changes_no_bit(
    make_processor: Any, make_image_processor: Any, make_image: Any, monkeypatch: Any, size: Any, resample: Any
) -> None:
    image_processor = make_image_processor(resample=resample)
    monkeypatch.setattr(image_utils_delta_llava, "STRIP_PIXELS", 1000)
    image = make_image(*size)
    pixels = make_processor(image_processor=image_processor)(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, image_processor(on_a_square(image), return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("size", [(10_000, 10), (10, 10_000), (60_000, 2)])
def test_the_square_of_a_long_image_is_never_in_memory(
    make_processor: Any, make_image_processor: Any, monkeypatch: Any, size: tuple[int, int]
) -> None:
    new, largest = Image.new, []
    monkeypatch.setattr(
        Image, "new", lambda mode, size, *rest: largest.append(size[0] * size[1]) or new(mode, size, *rest)
    )
    image = Image.new("RGB", size, "red")
    pixels = make_processor(image_processor=make_image_processor(336))(images=image, return_tensors="np")
    assert pixels["pixel_values"].shape == (1, 3, 336, 336)
    assert max(largest) <= 2 * image_utils_delta_llava.STRIP_PIXELS < 10_000**2


@pytest.mark.parametrize("do_pad", [None, True, False])
@pytest.mark.parametrize("default", [True, False])
def test_padding_can_be_left_out(make_processor: Any, make_image: Any, default: bool, do_pad: bool | None) -> None:
    processor = make_processor(do_pad=default)
    image = make_image(60, 30)
    pixels = processor(images=image, do_pad=do_pad, return_tensors="pt")["pixel_values"]
    shown = on_a_square(image) if (default if do_pad is None else do_pad) else image
    assert torch.equal(pixels, processor.image_processor(shown, return_tensors="pt")["pixel_values"])


def test_siglips_image_processor_works_with_its_own_mean_and_size(make_processor: Any, make_image: Any) -> None:
    image_processor = SiglipImageProcessorPil(size={"height": 36, "width": 24})
    image = make_image(50, 20)
    pixels = make_processor(image_processor=image_processor)(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 36, 24)
    square = on_a_square(image, (0.5, 0.5, 0.5))
    assert torch.equal(pixels, image_processor(square, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 36, "width": 36}, "crop_size": {"height": 28, "width": 28}},
        {"size": 30, "crop_size": 28},
        {"size": {"shortest_edge": 20, "longest_edge": 24}},
        {"size": (28, 28), "do_center_crop": False},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"resample": Image.Resampling.BILINEAR},
    ],
)
def test_arguments_of_the_image_processor_reach_padding_and_resizing(
    processor: Any, make_image: Any, options: dict[str, Any]
) -> None:
    image = make_image(50, 20)
    square = on_a_square(image, options.get("image_mean", OPENAI_CLIP_MEAN))
    expected = processor.image_processor(square, return_tensors="pt", **options)["pixel_values"]
    for given in (options, {"images_kwargs": options}):
        assert torch.equal(processor(images=image, return_tensors="pt", **given)["pixel_values"], expected)


# Sizes that the vision tower cannot take, and images so long that they are mostly padding.


@pytest.mark.parametrize(
    "options",
    [
        {"crop_size": {"height": 18, "width": 18}},
        {"crop_size": 10**6, "size": 10**6},
        {"size": 20, "do_center_crop": False},
        {"do_resize": False, "do_center_crop": False},
        {"size": {"shortest_edge": 10**5}},
        {"size": {"height": -1, "width": 28}},
        {"crop_size": {"height": 0, "width": 0}},
    ],
)
def test_sizes_that_the_tower_cannot_take_are_refused(processor: Any, make_image: Any, options: Any) -> None:
    for given in (options, {"images_kwargs": options}):
        with pytest.raises(ValueError, match="the vision tower takes|too large|positive integers"):
            processor(images=make_image(50, 20), **given)


@pytest.mark.parametrize("name", ["max_length", "pad_to_multiple_of"])
def test_paddings_beyond_any_model_are_refused(processor: Any, name: str) -> None:
    for given in ({name: 10**9, "padding": "max_length"}, {"text_kwargs": {name: 10**9}}):
        with pytest.raises(ValueError, match=f"`{name}=1000000000`: use a number of tokens, at most 1048576"):
            processor(text="a", **given)


def exact(image: Image.Image, side: int) -> np.ndarray:
    """`image` in the middle of its black square, which is resized to (side, side, 3), in float64."""
    length = max(image.size)
    left, top = (length - image.width) // 2, (length - image.height) // 2
    weights = bicubic(length, side)
    rows, columns = weights[:, top : top + image.height], weights[:, left : left + image.width]
    return np.stack([rows @ channel @ columns.T for channel in np.asarray(image, float).transpose(2, 0, 1)], axis=-1)


def bicubic(length: int, side: int) -> np.ndarray:
    """(side, length) weights of a bicubic filter (a = -0.5) as wide as a pixel of the result."""
    scale = length / side
    distance = np.abs((np.arange(length) + 0.5)[None] - ((np.arange(side) + 0.5) * scale)[:, None]) / scale
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(1200, 40), (40, 1201), (1001, 240), (243, 1003), (3333, 1), (1, 3001)])
def test_long_images_are_resized_as_if_whole_to_within_a_bound(
    make_processor: Any, make_image_processor: Any, make_image: Any, monkeypatch: Any, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(image_utils_delta_llava, "LONG_SIDE", 1000)
    image_processor = make_image_processor(do_normalize=False, image_mean=[0, 0, 0])
    image = make_image(*size)
    found = make_processor(image_processor=image_processor)(images=image, return_tensors="np")["pixel_values"][0]
    error = np.abs(found.transpose(1, 2, 0) * 255 - exact(image, 28).clip(0, 255))
    assert error.max() <= 4 and error.mean() < 0.5


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (10**7, 1), (1, 10**7), (1, 2000)])
def test_long_images_take_no_time(
    make_processor: Any, make_image_processor: Any, kind: str, size: tuple[int, int], do_pad: bool
) -> None:
    siglip = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    processor = make_processor(image_processor=make_image_processor(336) if kind == "clip" else siglip)
    image = Image.new("RGB", size, "red")
    start = time.process_time()
    pixels = processor(images=image, do_pad=do_pad, return_tensors="np")["pixel_values"]
    assert time.process_time() - start < 2
    assert pixels.shape == ((1, 3, 336, 336) if kind == "clip" else (1, 3, 384, 384))
    if not do_pad:
        red = processor(images=Image.new("RGB", (28, 28), "red"), return_tensors="np")["pixel_values"]
        assert np.abs(pixels - red).max() < 0.02  # the whole of it is red
    assert processor.image_losses(image, do_pad=do_pad)[0].keys() == set(processor.visual_token_budgets)


@pytest.mark.parametrize("size", [(2, 501), (501, 2), (3, 600)])
def test_the_middle_of_a_long_image_that_is_not_padded_is_its_middle(
    make_processor: Any, make_image_processor: Any, monkeypatch: Any, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(image_utils_delta_llava, "MAX_PIXELS", 4 * 28 * 28 * 100)
    image_processor = make_image_processor()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    found = make_processor(image_processor=image_processor, do_pad=False)(images=image, return_tensors="np")[
        "pixel_values"
    ]
    expected = image_processor(image, return_tensors="np")["pixel_values"]
    # Where the middle is between two pixels, it moves by one of 28.
    moved = [np.roll(expected, shift, axis) for axis in (2, 3) for shift in (-1, 0, 1)]
    assert (
        min(np.abs(found - other).mean() for other in moved) < 0.2 * np.abs(found - expected[..., ::-1, ::-1]).mean()
    )
