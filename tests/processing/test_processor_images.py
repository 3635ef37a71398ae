"""Images of every size and kind become the pixel values that the authors' code computes."""

import base64
import contextlib
import http.server
import io
import socket
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from transformers_delta_llava.processing import image_utils_delta_llava, load_chat_template


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


# Kinds of images. `raw` gives the 8-bit RGB pixels that reach the model, before normalising.


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
def test_every_mode_of_pillow_becomes_rgb(raw: Any, make_image: Any, mode: str) -> None:
    image = make_image(9, 9)
    through = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    given = image.convert(through).convert(mode) if through else image.convert(mode)
    opaque = {"LA": "L", "La": "L", "PA": "P", "RGBa": "RGB"}.get(mode, mode)
    expected = np.asarray(image.convert(opaque).convert("RGB"))
    np.testing.assert_array_equal(raw(given), expected)


def test_transparency_is_dropped_as_convert_does(raw: Any, make_image: Any, recwarn: Any) -> None:
    image = make_image(9, 9)
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
    images = [Image.fromarray(SIXTEEN_BITS), Image.fromarray(SIXTEEN_BITS.astype(np.int32))]
    assert [image.mode for image in images] == ["I;16", "I"]
    images[0].save(tmp_path / "grey.png")
    for image in (*images, tmp_path / "grey.png", str(tmp_path / "grey.png")):
        np.testing.assert_array_equal(raw(image), np.repeat(EIGHT_BITS[..., None], 3, axis=2))


def test_images_of_floats_are_scaled_not_clipped(raw: Any) -> None:
    for scale in (1 / 255, 1.0):
        image = Image.fromarray(EIGHT_BITS.astype(np.float32) * np.float32(scale))
        np.testing.assert_array_equal(raw(image)[..., 1], EIGHT_BITS)
    elsewhere = Image.fromarray(EIGHT_BITS.astype(np.float32) * 100 - 3000)
    ratio = (EIGHT_BITS.astype(np.float64) - EIGHT_BITS.min()) / (EIGHT_BITS.max() - EIGHT_BITS.min())
    np.testing.assert_array_equal(raw(elsewhere)[..., 0], np.rint(ratio * 255).astype(np.uint8))
    assert (raw(Image.new("F", (3, 3), -5.0)) == 0).all()
    assert (raw(Image.new("I", (3, 3), 10**6)) == 0).all()
    for huge in (3e38, -3e38):  # to which nothing can be added
        assert (raw(Image.new("F", (3, 3), huge)) == 0).all()
    far = np.array([[-3e38, 3e38]], np.float32)
    np.testing.assert_array_equal(raw(Image.fromarray(far), do_pad=False)[0, :, 0], [0, 255])
    farther = np.array([[-1.7e308, 0, 1.7e308]])
    np.testing.assert_array_equal(image_utils_delta_llava._to_bytes(farther, stretch=True), [[0, 128, 255]])


@pytest.mark.parametrize("kind", ["image", "path", "jpeg path"])
def test_images_are_turned_upright(raw: Any, make_image: Any, tmp_path: Path, kind: str) -> None:
    image = make_image(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise to show
    path = tmp_path / ("turned.jpg" if kind == "jpeg path" else "turned.png")
    image.save(path, exif=exif)
    stored = np.asarray(Image.open(path))
    shown = raw(Image.open(path) if kind == "image" else path)
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
def test_arrays_and_tensors_are_taken_as_they_are_laid_out(raw: Any, make_image: Any, kind: str) -> None:
    array = np.array(make_image(9, 9))
    array[0, 0], array[0, 1] = 0, 255
    np.testing.assert_array_equal(raw(ARRAYS[kind](array)), array)


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 1), (1, 9, 9)])
def test_grey_arrays_become_rgb(raw: Any, make_image: Any, shape: tuple[int, ...]) -> None:
    grey = np.asarray(make_image(9, 9).convert("L"))
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


def test_a_url_or_base64_image_goes_through_transformers(raw: Any, make_image: Any, tmp_path: Path) -> None:
    make_image(6, 6).save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    np.testing.assert_array_equal(raw(f"data:image/png;base64,{data}"), np.asarray(make_image(6, 6)))


def test_the_callers_image_stays_as_it_is(processor: Any, make_image: Any) -> None:
    image = make_image(20, 10).convert("P")
    before = image.tobytes()
    processor(images=image)
    assert (image.mode, image.size, image.tobytes()) == ("P", (20, 10), before)


BAD_IMAGES = {
    "a missing file": ("nowhere.png", "'nowhere.png' is not a file, a URL or an image in base64"),
    "a missing path": (Path("nowhere.png"), "No such file or directory"),
    "a folder": (".", "is not a file"),
    "an empty mapping": ({"bytes": None, "path": None}, "without `bytes`, `path` or `url`"),
    "a data URL without data": ("data:image/png;base64", "no comma"),
    "a data URL of noise": ("data:image/png;base64,%%%", "not base64"),
    "a host that does not exist": ("http://no.such.host.invalid/a.png", "cannot be read: "),
    "empty image": (Image.new("RGB", (0, 5)), r"empty \(0 x 5\)"),
    "empty array": (np.zeros((0, 5, 3), np.uint8), "empty"),
    "NaN": (np.full((4, 4, 3), np.nan), "NaN"),
    "NaN in a image": (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "NaN"),
    "infinite": (torch.full((3, 4, 4), torch.inf), "infinite"),
    "two channels": (np.zeros((7, 5, 2), np.uint8), r"shape \(7, 5, 2\)"),
    "five channels": (torch.zeros(5, 7, 7), r"shape \(5, 7, 7\)"),
    "one dimension": (np.zeros(4, np.uint8), r"shape \(4,\)"),
    "negative floats": (np.linspace(-1, 1, 48).reshape(4, 4, 3), "reach from -1 to 1"),
    "too large": (np.full((4, 4, 3), 2**20), "beyond 0..1, 0..255 or 0..65535"),
    "text for values": (np.full((4, 4, 3), "a"), "of type <U1"),
    "a number": (7, "of type int"),
    "bytes": (b"\x89PNG", "cannot identify an image in its 4 bytes"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_refused_by_its_number(processor: Any, make_image: Any, case: str) -> None:
    image, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=f"^Image 1 cannot be used: .*{message}"):
        processor(images=[make_image(), image], text="<image><image>")


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_a_broken_file_is_refused_by_its_number(
    processor: Any, make_image: Any, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "broken.png"
    make_image(50, 50).save(path)
    path.write_bytes(path.read_bytes()[:-900] if content is None else content)  # None: a file cut short
    with pytest.raises(ValueError, match="^Image 0 cannot be used: "):
        processor(images=path, text="<image>")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_that_are_rescaled_already_stay_so(processor: Any, make_image: Any, dtype: Any) -> None:
    image = make_image()
    expected = processor(images=image, return_tensors="np")["pixel_values"]
    floats = np.asarray(image).astype(dtype) / 255
    for kwargs in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}, {}):
        np.testing.assert_array_equal(
            processor(images=[floats], return_tensors="np", **kwargs)["pixel_values"], expected
        )
        losses = processor.image_losses([floats], **kwargs)
        assert losses == processor.image_losses(image)
    with pytest.raises(ValueError, match="image 1 is floats in 0..1, but image 0 is not"):
        processor(images=[image, floats], do_rescale=False)


def test_images_as_files_bytes_and_mappings(raw: Any, make_image: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "an image.png"
    make_image(6, 6).save(path)
    data = path.read_bytes()
    encoded = base64.b64encode(data).decode()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sources = [str(path), path, path.as_uri(), "~/an image.png", Path("~/an image.png"), "an image.png"]
    sources += [data, bytearray(data), memoryview(data), io.BytesIO(data), encoded, encoded[:60] + "\n" + encoded[60:]]
    sources += [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"url": path.as_uri()}]
    sources += [f"data:{kind};base64,{encoded}" for kind in ("image/png", "", "IMAGE/x-odd;q=1", "text/plain")]
    sources += [f"data:,{urllib.parse.quote(data)}", f"DATA:image/png;BASE64,{encoded.rstrip('=')}"]
    for source in sources:
        np.testing.assert_array_equal(raw(source), np.asarray(make_image(6, 6)))


def test_generators_and_columns_are_lists(processor: Any, make_image: Any) -> None:
    images = [make_image(), make_image(seed=1)]
    texts = ["<image>a", "<image>b"]
    expected = processor(images=images, text=texts, return_tensors="np")
    column = datasets.Dataset.from_dict({"image": images, "text": texts}).cast_column("image", datasets.Image())
    objects = np.empty(2, object)
    objects[:] = images
    given = [
        (iter(images), iter(texts)),
        ((image for image in images), tuple(texts)),
        (column["image"], column["text"]),
        (objects, np.array(texts)),
        (([image] for image in images), texts),
        ([iter([image]) for image in images], texts),
    ]
    for some_images, text in given:
        found = processor(images=some_images, text=text, return_tensors="np")
        for name in ("input_ids", "pixel_values"):
            np.testing.assert_array_equal(found[name], expected[name])


def test_everything_that_a_call_takes_may_be_in_a_chat(processor: Any, make_image: Any, tmp_path: Path) -> None:
    image = make_image(28, 28)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    array = np.array(image)
    given = [array, torch.from_numpy(array.transpose(2, 0, 1).copy()), data, io.BytesIO(data), {"bytes": data}, image]
    expected = processor(images=image, return_tensors="np")["pixel_values"]
    for source in given:
        content = [{"type": "image", "image": source}, {"type": "text", "text": "a"}]
        found = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=load_chat_template("vicuna_v1"),
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "np"},
        )
        np.testing.assert_array_equal(found["pixel_values"], expected)


# Sizes: what the vision tower cannot take, and images so long that they are mostly padding.


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


# URLs.


class Answers(http.server.BaseHTTPRequestHandler):
    """A server that says 404, or sends a byte now and then, or never stops."""

    def do_GET(self) -> None:
        if self.path == "/headers":
            return self.drip(b"HTTP/1.1 200 OK\r\nX: ")
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        if self.path == "/image":
            self.wfile.write(self.server.image)  # type: ignore[attr-defined]
        elif self.path == "/drip":
            self.drip(b"")
        elif self.path == "/endless":
            self.drip(bytes(2**16), 0)

    def drip(self, first: bytes, pause: float = 0.05) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(first)
            while not self.server.is_done:  # type: ignore[attr-defined]
                self.wfile.write(first if pause == 0 else b"a")
                time.sleep(pause)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(make_image: Any) -> Any:
    file = io.BytesIO()
    make_image(6, 6).save(file, "PNG")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        running.image, running.is_done = file.getvalue(), False  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.is_done = True  # type: ignore[attr-defined]
        running.shutdown()


def test_a_url_is_read(raw: Any, make_image: Any, server: str) -> None:
    np.testing.assert_array_equal(raw(f"{server}/image"), np.asarray(make_image(6, 6)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "missing answers 404 Not Found"),
        ("drip", "timed out: it takes longer than 0.5 seconds"),
        ("headers", "timed out: it takes longer than 0.5 seconds"),
        ("endless", "sends more than 1 MiB"),
    ],
)
def test_a_url_that_gives_no_image_is_given_up(
    processor: Any, server: str, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setattr(image_utils_delta_llava, "URL_TOTAL_TIMEOUT", 0.5)
    monkeypatch.setattr(image_utils_delta_llava, "URL_MAX_BYTES", 2**20)
    with pytest.raises(ValueError, match=f"^Image 0 cannot be used: .*{message}"):
        processor(images=f"{server}/{path}", text="<image>")


def test_a_url_that_keeps_silent_is_given_up(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_utils_delta_llava, "URL_TIMEOUT", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,  # takes the connection and says nothing
        pytest.raises(ValueError, match="^Image 0 cannot be used: .*timed out"),
    ):
        processor(images=f"http://127.0.0.1:{silent.getsockname()[1]}/a.png", text="<image>")
