"""Pictures of every size and kind become the pixel values that the authors' code computes."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from transformers_delta_llava.processing import pictures_delta_llava


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
def test_pixel_values_are_those_of_the_released_code(processor: Any, make_picture: Any, size: tuple[int, int]) -> None:
    image = make_picture(*size)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28)
    assert pixels.dtype == torch.float32
    square = on_a_square(image)
    assert torch.equal(pixels, processor.image_processor(square, return_tensors="pt")["pixel_values"])
    resized = np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC)) / 255
    expected = (resized - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
    np.testing.assert_allclose(pixels[0].numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_the_padding_has_clips_mean_colour_and_the_smaller_half_comes_first(raw: Any, make_picture: Any) -> None:
    image = make_picture(4, 7)
    pixels = raw(image)
    assert pixels.shape == (7, 7, 3)
    assert (pixels[:, :1] == (122, 116, 104)).all()
    assert (pixels[:, 1:5] == np.asarray(image)).all()
    assert (pixels[:, 5:] == (122, 116, 104)).all()


@pytest.mark.parametrize("resample", list(Image.Resampling))
@pytest.mark.parametrize("size", [(100, 90), (90, 101), (7, 250)])
def test_working_in_strips_changes_no_bit(
    make_processor: Any, make_image_processor: Any, make_picture: Any, monkeypatch: Any, size: Any, resample: Any
) -> None:
    image_processor = make_image_processor(resample=resample)
    monkeypatch.setattr(pictures_delta_llava, "STRIP_PIXELS", 1000)
    image = make_picture(*size)
    pixels = make_processor(image_processor=image_processor)(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, image_processor(on_a_square(image), return_tensors="pt")["pixel_values"])


def test_a_very_long_picture_takes_little_memory(tmp_path: Path) -> None:
    # 10000 x 10000 would be 400 MB in Pillow, 300 MB more in each copy; 60000 x 2 would be 14 GB.
    script = """
import resource
from PIL import Image
from transformers import CLIPImageProcessorPil
from processing.processing_delta_llava import DeltaLlavaProcessor  # the folder works by itself
processor = object.__new__(DeltaLlavaProcessor)  # no tokenizer is needed for this
processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
processor.num_visual_tokens, processor.image_seq_length, processor.auto_max_loss = "auto", 4, 0.3
processor.visual_token_budgets, processor.do_pad, processor.image_token = (4,), True, "<image>"
images = [Image.new("RGB", size, "red") for size in [(10000, 10), (10, 10000), (60000, 2)]]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pixels = processor._process_images(images, return_tensors="np")[0]["pixel_values"]
assert pixels.shape == (3, 3, 336, 336)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(pictures_delta_llava.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) < 200 * 1024  # kB


@pytest.mark.parametrize("do_pad", [None, True, False])
@pytest.mark.parametrize("default", [True, False])
def test_padding_can_be_left_out(make_processor: Any, make_picture: Any, default: bool, do_pad: bool | None) -> None:
    processor = make_processor(do_pad=default)
    image = make_picture(60, 30)
    pixels = processor(images=image, do_pad=do_pad, return_tensors="pt")["pixel_values"]
    shown = on_a_square(image) if (default if do_pad is None else do_pad) else image
    assert torch.equal(pixels, processor.image_processor(shown, return_tensors="pt")["pixel_values"])


def test_siglips_image_processor_works_with_its_own_mean_and_size(make_processor: Any, make_picture: Any) -> None:
    image_processor = SiglipImageProcessorPil(size={"height": 36, "width": 24})
    image = make_picture(50, 20)
    pixels = make_processor(image_processor=image_processor)(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 36, 24)
    square = on_a_square(image, (0.5, 0.5, 0.5))
    assert torch.equal(pixels, image_processor(square, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 20, "width": 20}, "crop_size": {"height": 18, "width": 18}},
        {"size": 20, "crop_size": 18},
        {"size": {"shortest_edge": 20, "longest_edge": 24}},
        {"do_resize": False, "do_center_crop": False},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"resample": Image.Resampling.BILINEAR},
    ],
)
def test_arguments_of_the_image_processor_reach_padding_and_resizing(
    processor: Any, make_picture: Any, options: dict[str, Any]
) -> None:
    image = make_picture(50, 20)
    square = on_a_square(image, options.get("image_mean", OPENAI_CLIP_MEAN))
    expected = processor.image_processor(square, return_tensors="pt", **options)["pixel_values"]
    for given in (options, {"images_kwargs": options}):
        assert torch.equal(processor(images=image, return_tensors="pt", **given)["pixel_values"], expected)


# Kinds of pictures. `raw` gives the 8-bit RGB pixels that reach the model, before normalising.


@pytest.fixture
def raw(make_processor: Any, make_image_processor: Any) -> Any:
    image_processor = make_image_processor(do_resize=False, do_center_crop=False, do_normalize=False)
    processor = make_processor(image_processor=image_processor)

    def pixels(image: Any, **kwargs: Any) -> np.ndarray:
        values = processor(images=[image], return_tensors="np", **kwargs)["pixel_values"][0]
        return np.rint(values * 255).astype(np.uint8).transpose(1, 2, 0)

    return pixels


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_of_pillow_becomes_rgb(raw: Any, make_picture: Any, mode: str) -> None:
    image = make_picture(9, 9)
    through = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    given = image.convert(through).convert(mode) if through else image.convert(mode)
    opaque = {"LA": "L", "La": "L", "PA": "P", "RGBa": "RGB"}.get(mode, mode)
    expected = np.asarray(image.convert(opaque).convert("RGB"))
    np.testing.assert_array_equal(raw(given), expected)


def test_transparency_is_dropped_as_convert_does(raw: Any, make_picture: Any, recwarn: Any) -> None:
    image = make_picture(9, 9)
    see_through = image.copy()
    see_through.putalpha(Image.new("L", image.size, 7))
    np.testing.assert_array_equal(raw(see_through), np.asarray(image))
    palette = image.quantize(16)
    colours = np.asarray(palette.convert("RGB"))
    for transparency in (3, bytes(range(16))):
        palette.info["transparency"] = transparency
        np.testing.assert_array_equal(raw(palette), colours)
    assert not [warning for warning in recwarn if "Transparency" in str(warning.message)]


SIXTEEN_BITS = np.arange(0, 65536, 257 * 16, dtype=np.uint16).reshape(4, 4)
EIGHT_BITS = (SIXTEEN_BITS // 257).astype(np.uint8)


def test_sixteen_bits_are_scaled_not_clipped(raw: Any, tmp_path: Path) -> None:
    pictures = [Image.fromarray(SIXTEEN_BITS), Image.fromarray(SIXTEEN_BITS.astype(np.int32))]
    assert [picture.mode for picture in pictures] == ["I;16", "I"]
    pictures[0].save(tmp_path / "grey.png")
    for image in (*pictures, tmp_path / "grey.png", str(tmp_path / "grey.png")):
        np.testing.assert_array_equal(raw(image), np.repeat(EIGHT_BITS[..., None], 3, axis=2))


def test_pictures_of_floats_are_scaled_not_clipped(raw: Any) -> None:
    for scale in (1 / 255, 1.0):
        image = Image.fromarray(EIGHT_BITS.astype(np.float32) * np.float32(scale))
        np.testing.assert_array_equal(raw(image)[..., 1], EIGHT_BITS)
    elsewhere = Image.fromarray(EIGHT_BITS.astype(np.float32) * 100 - 3000)
    ratio = (EIGHT_BITS.astype(np.float64) - EIGHT_BITS.min()) / (EIGHT_BITS.max() - EIGHT_BITS.min())
    np.testing.assert_array_equal(raw(elsewhere)[..., 0], np.rint(ratio * 255).astype(np.uint8))
    assert (raw(Image.new("F", (3, 3), -5.0)) == 0).all()
    assert (raw(Image.new("I", (3, 3), 10**6)) == 0).all()


@pytest.mark.parametrize("kind", ["picture", "path", "jpeg path"])
def test_pictures_are_turned_upright(raw: Any, make_picture: Any, tmp_path: Path, kind: str) -> None:
    image = make_picture(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to show
    path = tmp_path / ("turned.jpg" if kind == "jpeg path" else "turned.png")
    image.save(path, exif=exif)
    stored = np.asarray(Image.open(path))
    shown = raw(Image.open(path) if kind == "picture" else path)
    np.testing.assert_array_equal(shown, np.rot90(stored, -1))


ARRAYS = {
    "height, width, channels": lambda a: a,
    "channels, height, width": lambda a: a.transpose(2, 0, 1),
    "tensor": lambda a: torch.from_numpy(a.transpose(2, 0, 1).copy()),
    "tensor, channels last": torch.from_numpy,
    "floats 0..1": lambda a: a / 255,
    "floats 0..255": lambda a: a.astype(np.float32),
    "bfloat16 tensor": lambda a: torch.from_numpy(a).to(torch.bfloat16),
    "tensor with gradient": lambda a: torch.from_numpy(a / 255).requires_grad_(),
    "integers": lambda a: a.astype(np.int64),
    "short integers": lambda a: a.astype(np.int16),
    "16 bits": lambda a: a.astype(np.uint16) * 257,
    "16 bits in 32": lambda a: a.astype(np.int32) * 257,
    "big-endian 16 bits": lambda a: (a.astype(np.uint16) * 257).astype(">u2"),
    "four channels": lambda a: np.concatenate([a, a[..., :1]], axis=2),
    "not contiguous": lambda a: a[:, ::-1][:, ::-1],
    "batch of one": lambda a: a[None],
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_and_tensors_are_taken_as_they_are_laid_out(raw: Any, make_picture: Any, kind: str) -> None:
    array = np.array(make_picture(9, 9))
    array[0, 0], array[0, 1] = 0, 255
    np.testing.assert_array_equal(raw(ARRAYS[kind](array)), array)


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 1), (1, 9, 9)])
def test_grey_arrays_become_rgb(raw: Any, make_picture: Any, shape: tuple[int, ...]) -> None:
    grey = np.asarray(make_picture(9, 9).convert("L"))
    for array in (grey.reshape(shape), torch.from_numpy(grey.copy()).reshape(shape)):
        np.testing.assert_array_equal(raw(array), np.repeat(grey[..., None], 3, axis=2))
    truth = grey > 127
    np.testing.assert_array_equal(raw(truth.reshape(shape))[..., 0], truth * np.uint8(255))


def test_the_smallest_arrays_and_ambiguous_layouts(raw: Any) -> None:
    colour = np.array([[[10, 20, 30]]], np.uint8)
    np.testing.assert_array_equal(raw(colour), colour)  # one pixel: height, width, channels
    np.testing.assert_array_equal(raw(torch.from_numpy(colour).reshape(3, 1, 1)), colour)
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    np.testing.assert_array_equal(raw(cube), cube)
    np.testing.assert_array_equal(raw(torch.from_numpy(cube)), cube.transpose(1, 2, 0))
    np.testing.assert_array_equal(raw(cube, input_data_format="channels_first"), cube.transpose(1, 2, 0))
    np.testing.assert_array_equal(raw(torch.from_numpy(cube), input_data_format="channels_last"), cube)
    nested = {"images_kwargs": {"input_data_format": "channels_first"}}
    np.testing.assert_array_equal(raw(cube, **nested), cube.transpose(1, 2, 0))


def test_a_url_or_base64_picture_goes_through_transformers(raw: Any, make_picture: Any, tmp_path: Path) -> None:
    import base64

    make_picture(6, 6).save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    np.testing.assert_array_equal(raw(f"data:image/png;base64,{data}"), np.asarray(make_picture(6, 6)))


def test_the_callers_picture_stays_as_it_is(processor: Any, make_picture: Any) -> None:
    image = make_picture(20, 10).convert("P")
    before = image.tobytes()
    processor(images=image)
    assert (image.mode, image.size, image.tobytes()) == ("P", (20, 10), before)


BAD_IMAGES = {
    "a missing file": ("nowhere.png", "Incorrect image source"),
    "empty picture": (Image.new("RGB", (0, 5)), r"empty \(0 x 5\)"),
    "empty array": (np.zeros((0, 5, 3), np.uint8), "empty"),
    "NaN": (np.full((4, 4, 3), np.nan), "NaN"),
    "NaN in a picture": (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "NaN"),
    "infinite": (torch.full((3, 4, 4), torch.inf), "infinite"),
    "two channels": (np.zeros((7, 5, 2), np.uint8), r"shape \(7, 5, 2\)"),
    "five channels": (torch.zeros(5, 7, 7), r"shape \(5, 7, 7\)"),
    "one dimension": (np.zeros(4, np.uint8), r"shape \(4,\)"),
    "negative floats": (np.linspace(-1, 1, 48).reshape(4, 4, 3), "reach from -1 to 1"),
    "too large": (np.full((4, 4, 3), 2**20), "beyond 0..1, 0..255 or 0..65535"),
    "text for values": (np.full((4, 4, 3), "a"), "of type <U1"),
    "a number": (7, "of type int"),
    "bytes": (b"\x89PNG", "of type bytes"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_what_is_no_picture_is_refused_by_its_number(processor: Any, make_picture: Any, case: str) -> None:
    image, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=f"^Image 1 cannot be used: .*{message}"):
        processor(images=[make_picture(), image], text="<image><image>")


@pytest.mark.parametrize("content", [b"", b"this is no picture", None])
def test_a_broken_file_is_refused_by_its_number(
    processor: Any, make_picture: Any, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "broken.png"
    make_picture(50, 50).save(path)
    path.write_bytes(path.read_bytes()[:-900] if content is None else content)  # None: a file cut short
    with pytest.raises(ValueError, match="^Image 0 cannot be used: "):
        processor(images=path, text="<image>")


def test_floats_do_not_go_with_do_rescale_false(processor: Any) -> None:
    # They would come out 255 times too large: here all pictures are 8 bits when the image processor gets them.
    for kwargs in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
        with pytest.raises(ValueError, match="Image 0 cannot be used: .*do_rescale=False"):
            processor(images=np.full((4, 4, 3), 0.5), **kwargs)


def test_a_url_that_keeps_silent_is_given_up(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_delta_llava, "URL_TIMEOUT", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,  # takes the connection and says nothing
        pytest.raises(ValueError, match="^Image 0 cannot be used: .*timed out"),
    ):
        processor(images=f"http://127.0.0.1:{silent.getsockname()[1]}/a.png", text="<image>")
