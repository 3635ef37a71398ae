"""Pixel values are those of the authors' code, for images of every size, mode and form."""

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from transformers_delta_llava.processing import processing_delta_llava


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
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"resample": Image.Resampling.BILINEAR},
    ],
)
def test_arguments_of_the_image_processor_reach_it(processor: Any, make_image: Any, options: dict[str, Any]) -> None:
    image = make_image(50, 20)
    square = on_a_square(image, options.get("image_mean", OPENAI_CLIP_MEAN))
    expected = processor.image_processor(square, return_tensors="pt", **options)["pixel_values"]
    for given in (options, {"images_kwargs": options}):
        assert torch.equal(processor(images=image, return_tensors="pt", **given)["pixel_values"], expected)


def test_an_image_whose_square_would_take_gigabytes_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="60000 x 2"):
        processor(images=Image.new("RGB", (60_000, 2)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_eight_bits_becomes_rgb_without_its_transparency(raw: Any, make_image: Any, mode: str) -> None:
    image = make_image().convert("RGBA")
    image.putalpha(100)
    image = image.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "HSV", "1") else image.convert(mode)
    assert np.array_equal(raw(image, do_pad=False), np.asarray(image.convert("RGB")))


def test_images_are_turned_upright(raw: Any, make_image: Any) -> None:
    image, file = make_image(40, 20), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(file, "PNG", exif=exif)
    assert np.array_equal(raw(Image.open(file), do_pad=False), np.rot90(np.asarray(image), 3))


def test_forms_of_an_image(raw: Any, make_image: Any, tmp_path: Any) -> None:
    image = make_image()
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    text = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    forms = [array, array.transpose(2, 0, 1), array / 255, torch.from_numpy(array.transpose(2, 0, 1).copy())]
    for form in [*forms, str(tmp_path / "a.png"), text, f"data:image/png;base64,{text}"]:
        assert np.array_equal(raw(form, do_pad=False), array)
    grey = np.asarray(image.convert("L"))
    assert np.array_equal(raw(grey, do_pad=False), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("source", ["nowhere.png", b"bytes", 7, {"path": "a.png"}])
def test_what_is_no_image_is_refused(processor: Any, source: Any) -> None:
    with pytest.raises((ValueError, TypeError, OSError)):
        processor(images=[source], text="<image>")


def test_the_callers_image_stays_as_it_is(processor: Any, make_image: Any) -> None:
    image = make_image(60, 20)
    before = image.tobytes()
    processor(images=[image], text="<image>")
    assert image.tobytes() == before and max(image.size) < processing_delta_llava.MAX_SIDE
