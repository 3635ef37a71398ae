"""Images before the image processor: loaded, decoded to upright 8-bit RGB, and padded to a square."""

import base64
import binascii
import contextlib
import io
import math
import os
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


# Rows of a padded image are resized in strips of about this many pixels.
STRIP_PIXELS = 2**22
# Longer than LONG_SIDE pixels and LONG_RATIO times its short side, an image is averaged over blocks before it is resized,
# BLOCKS of them for each pixel that the tower sees: its square would cost minutes and gigabytes, nearly all of it padding.
LONG_SIDE, LONG_RATIO, BLOCKS = 2**14, 4, 8
# The most pixels that an image may have on its way to the tower. Only settings of a call ask for more.
MAX_PIXELS = 2**26
# Seconds between two packets and for the whole answer of a URL, and the bytes that it may send.
URL_TIMEOUT, URL_TOTAL_TIMEOUT, URL_MAX_BYTES = 10.0, 30.0, 100 * 2**20
# Set in `Image.info` of an image that was floats in 0..1: as 8 bits it has to be rescaled, even where `do_rescale=False` says of
# the floats that they have been.
RESCALED = "rescaled"


def to_rgb(image: Any, index: int, layout: Any = None) -> Image.Image:
    """
    Image number `index` of a call as an upright 8-bit RGB image.

    Args:
        image: PIL image, array, tensor, or what `open_image` takes.
        index: for messages.
        layout: `"channels_first"` or `"channels_last"` for arrays; by their shape when `None`.

    Raises:
        ValueError: the image cannot be used; it is named by its number.
    """
    try:
        if isinstance(image, (np.ndarray, torch.Tensor)) or getattr(image, "ndim", 0) >= 2:
            image = _from_array(image, layout)
        elif not isinstance(image, Image.Image):
            image = open_image(image)
        if 0 in image.size:
            raise ValueError(f"it is empty ({image.width} x {image.height})")
        image.load()  # what is wrong with a file shows here
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # without a turn Pillow would make a copy
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image)
            if image.mode == "I" and values.min() >= 0 and values.max() < 2**16:
                values = values.astype(np.uint16)  # "I" is how older Pillow opens 16-bit files, newer as "I;16"
            image = _to_image(values, stretch=True)
        if image.mode in ("RGBa", "La"):
            image = image.convert(image.mode.upper())
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # whatever Pillow, the file system or the network raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"Image {index} cannot be used: {reason}") from error


def open_image(source: Any) -> Image.Image:
    """
    The image that `source` names or holds, as Pillow opens it.

    Args:
        source: a path (`~` is the home folder), a `file:`, `http:`, `https:` or `data:` URL, base64 text, bytes, an open
            binary file, or a mapping with one of these as `bytes`, `path` or `url`, as `datasets` keeps images.

    Raises:
        TypeError: it is none of these.
        ValueError: it does not name an image, or the URL's server refuses it, takes longer than `URL_TOTAL_TIMEOUT` or sends more
            than `URL_MAX_BYTES`.
        OSError: it cannot be read, or Pillow does not know it.
    """
    if isinstance(source, Mapping):
        given = [source[name] for name in ("bytes", "path", "url") if source.get(name) is not None]
        if not given or isinstance(given[0], Mapping):
            raise ValueError("it is a mapping without `bytes`, `path` or `url`")
        source = given[0]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source))
    if hasattr(source, "read"):
        return Image.open(source)
    if isinstance(source, os.PathLike):
        return _open_file(os.fsdecode(source))
    if not isinstance(source, str):
        raise TypeError(f"it is of type {type(source).__name__}, not an image, an array, bytes, a path or a URL")
    scheme, _, rest = source[:8].lower().partition(":")
    if scheme in ("http", "https"):
        return _open_bytes(download(source))
    if scheme == "data":
        return _open_bytes(_from_data_url(source))
    if scheme == "file" and rest.startswith("/"):
        return _open_file(urllib.request.url2pathname(urllib.parse.urlsplit(source).path))
    if os.path.exists(os.path.expanduser(source)):
        return _open_file(source)
    try:
        return _open_bytes(base64.b64decode("".join(source.split()), validate=True))
    except ValueError as error:
        raise ValueError(f"{source[:100]!r} is not a file, a URL or an image in base64") from error


def _open_file(path: str) -> Image.Image:
    path = os.path.expanduser(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a folder; opening a pipe could block for ever
        raise ValueError(f"{path[:200]} is not a file")
    return Image.open(path)


def _open_bytes(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # it names an object in memory
        raise ValueError(f"Pillow cannot identify an image in its {len(data)} bytes") from error


def _from_data_url(url: str) -> bytes:
    """The bytes of a `data:` URL. Its media type is ignored: Pillow looks at the bytes, and many URLs name none or a wrong one."""
    header, comma, payload = url.partition(",")
    if not comma:
        raise ValueError("the data URL has no comma before its data")
    data = urllib.parse.unquote_to_bytes(payload)
    if not header.lower().rstrip().endswith(";base64"):
        return data
    data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL is not base64: {error}") from error


def download(url: str, max_bytes: int | None = None) -> bytes:
    """
    The bytes at an `http:` or `https:` URL.

    Args:
        url: redirects are followed.
        max_bytes: by default `URL_MAX_BYTES`.

    Raises:
        ValueError: it answers with an error, sends more, or takes longer than `URL_TOTAL_TIMEOUT`.
    """
    limit = URL_MAX_BYTES if max_bytes is None else max_bytes
    end = time.monotonic() + URL_TOTAL_TIMEOUT
    blocks: list[bytes] = []
    errors: list[Exception] = []

    def read() -> None:
        try:
            context = ssl.create_default_context()
            with contextlib.suppress(ImportError):  # a system may have no certificates; transformers' own client has
                context.load_verify_locations(import_module("certifi").where())
            request = urllib.request.Request(url, headers={"User-Agent": "DeltaLlavaProcessor (Python)"})
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT, context=context) as response:
                while (block := response.read1(2**16)) and time.monotonic() < end:
                    blocks.append(block)
                    if sum(map(len, blocks)) > limit:
                        raise ValueError(f"{url[:200]} sends more than {limit >> 20} MiB")
        except urllib.error.HTTPError as error:
            errors.append(ValueError(f"{url[:200]} answers {error.code} {error.reason}"))
        except urllib.error.URLError as error:  # wraps what the network said
            errors.append(error.reason if isinstance(error.reason, OSError) else error)
        except Exception as error:
            errors.append(error)

    # In a thread: even headers can arrive byte by byte, and each byte restarts the timeout of the socket.
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(URL_TOTAL_TIMEOUT)
    if thread.is_alive() or (not errors and time.monotonic() >= end):
        raise ValueError(f"{url[:200]} timed out: it takes longer than {URL_TOTAL_TIMEOUT:g} seconds")
    if errors:
        raise ValueError(f"{url[:200]} cannot be read: {errors[0]}") if isinstance(errors[0], OSError) else errors[0]
    return b"".join(blocks)


def _from_array(image: Any, layout: Any = None) -> Image.Image:
    """An array or tensor, (H, W), (H, W, C) or (C, H, W), as an 8-bit image; where both fit, tensors are (C, H, W)."""
    is_tensor = isinstance(image, torch.Tensor)
    if is_tensor:
        image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    image = np.asarray(image)
    if image.size == 0:
        raise ValueError(f"it is empty (shape {image.shape})")
    if image.ndim == 3:
        first, last = image.shape[0] in (1, 3, 4), image.shape[-1] in (1, 3, 4)
        if layout == "channels_first" or (layout is None and first and (is_tensor or not last)):
            image = np.moveaxis(image, 0, -1)
        if image.shape[-1] in (1, 3, 4):
            return _to_image(image[..., 0] if image.shape[-1] == 1 else image[..., :3])
    if image.ndim == 2:
        return _to_image(image)
    raise ValueError(f"its shape {image.shape} is none of (H, W), (H, W, C), (C, H, W) with 1, 3 or 4 channels")


def _to_image(values: np.ndarray, stretch: bool = False) -> Image.Image:
    """An 8-bit image of (H, W) or (H, W, 3) `values`; see `_to_bytes`. `RESCALED` marks floats in 0..1."""
    image = Image.fromarray(np.ascontiguousarray(_to_bytes(values, stretch)))
    if values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1:
        image.info[RESCALED] = True
    return image


def _to_bytes(values: np.ndarray, stretch: bool = False) -> np.ndarray:
    """
    `values` on the scale 0..255, rounded, as uint8.

    Booleans count as 0..1, uint16 as 0..65535; other integers as 0..255, or 0..65535 if some are larger; floats as
    0..1, or 0..255 if some are larger. Values beyond are refused; with `stretch` they span their own range.
    """
    if values.dtype == np.uint8:
        return values
    kind = values.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"its values are of type {values.dtype}")
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are NaN or infinite")
    low, high = float(values.min()), float(values.max())
    if kind == "b" or (kind == "f" and high <= 1):
        start, stop = 0.0, 1.0
    elif kind == "f" or (high <= 255 and (kind, values.dtype.itemsize) != ("u", 2)):
        start, stop = 0.0, 255.0
    else:
        start, stop = 0.0, 65535.0
    if low < start or high > stop:
        if not stretch:
            raise ValueError(f"its values reach from {low:g} to {high:g}, beyond 0..1, 0..255 or 0..65535")
        if high == low:
            return np.zeros(values.shape, np.uint8)
        if math.isinf(high - low):
            values, low, high = values / 2, low / 2, high / 2
        start, stop = low, high
    return np.rint((values.astype(np.float64) - start) * (255.0 / (stop - start))).astype(np.uint8)


def pad_to_square(image: Image.Image, option: Callable[[str], Any]) -> Image.Image:
    """
    `image` in the middle of a square of the mean colour, already resized where the image processor would resize it.

    Source: "pad" of the authors' code: colour `int(mean * 255)` per channel, offset rounded down. Pillow resizes
    horizontally, then vertically, with 8 bits in between. So the square can be resized strip by strip, to the same
    bits: an image of 10000 x 10 never becomes one of 10000 x 10000. Only an image past `LONG_SIDE` and `LONG_RATIO` is
    averaged over blocks first, which moves the 8-bit values of the result by at most 4, on the average by less than 0.5.

    Args:
        image: RGB, 8 bits.
        option: gives the image processor's settings by name.

    Raises:
        ValueError: the square is larger than `LONG_SIDE`, and is not resized.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    mean = option("image_mean")
    colour = tuple(int(channel * 255) for channel in np.broadcast_to(0.0 if mean is None else mean, 3))
    size, resample = square_target(option("size")), option("resample")
    if not option("do_resize") or size is None or not isinstance(resample, int):
        if side > LONG_SIDE:
            raise ValueError(f"as a square of {side} x {side} pixels it is too large without being resized")
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, (left, top))
        return square
    extent: float = side  # of the square, in pixels of `image`
    if is_long(image.size) and (factor := side // (BLOCKS * max(size))) > 1:
        image, left, top = _average_blocks(image, factor, colour)
        extent, side = side / factor, -(-side // factor)
    narrow = Image.new("RGB", (size[0], side), colour)
    rows = max(1, STRIP_PIXELS // side)
    for start in range(0, image.height, rows):
        stop = min(start + rows, image.height)
        strip = Image.new("RGB", (side, stop - start), colour)
        strip.paste(image.crop((0, start, image.width, stop)), (left, 0))
        strip = strip.resize((size[0], stop - start), resample, box=(0, 0, extent, stop - start))
        narrow.paste(strip, (0, top + start))
    return narrow.resize(size, resample, box=(0, 0, size[0], extent))


def is_long(size: tuple[int, int]) -> bool:
    """Whether an image of (width, height) `size` is so long that most of its square would be padding."""
    return max(size) > max(LONG_SIDE, LONG_RATIO * min(size))


def _average_blocks(image: Image.Image, factor: int, colour: Sequence[int]) -> tuple[Image.Image, int, int]:
    """
    `image` in the middle of its square of `colour`, a pixel for each block of `factor` x `factor`, and (left, top) in blocks.

    Along its length the image fills the square, so blocks begin where it does. Across, a block may hold it in part.
    """
    wide = image.width > image.height
    short, side = sorted(image.size)
    values = np.asarray(image.reduce((factor, 1) if wide else (1, factor)))
    start = (side - short) // 2
    first, last = start // factor, -(-(start + short) // factor)
    cuts = np.clip(np.arange(first, last + 1) * factor - start, 0, short)
    sums = np.add.reduceat(values, cuts[:-1], axis=0 if wide else 1, dtype=np.float64)
    padding = (factor - np.diff(cuts)).reshape((-1, 1, 1) if wide else (1, -1, 1))
    blocks = np.rint((sums + padding * np.array(colour)) / factor).astype(np.uint8)
    return Image.fromarray(blocks), 0 if wide else first, first if wide else 0


def cut_to_center(image: Image.Image, option: Callable[[str], Any]) -> Image.Image:
    """
    The part of an unpadded `image` that the image processor has to see, where it is too long to be resized as a whole.

    `option` gives the image processor's settings by name. Where they cut the center out of an image resized by its short
    side, that is 16 times the short side; where they resize it to a given shape, `BLOCKS` pixels for each one of that. The
    result is off by up to one part in 16 of a pixel of the tower, or as in `pad_to_square`.
    """
    size, names = square_target(option("size")), set(_entries(option("size")))
    if size is None or not option("do_resize"):
        return image
    short, side = sorted(image.size)
    wide = image.width > image.height
    if names == {"width", "height"} and is_long(image.size):
        factor = max(1, side // (BLOCKS * size[0 if wide else 1]))
        return image.reduce((factor, 1) if wide else (1, factor))
    resized = size[0] ** 2 * side // short
    if names == {"shortest_edge"} and option("do_center_crop") and resized > MAX_PIXELS // 4:
        start = (side - 16 * short) // 2
        return image.crop((start, 0, side - start, short) if wide else (0, start, short, side - start))
    if names != {"width", "height"} and resized > MAX_PIXELS:
        raise ValueError(f"it is too long to be resized by its short side ({image.width} x {image.height})")
    return image


def square_target(size: Any) -> tuple[int, int] | None:
    """
    (width, height) that an image processor's `size` gives a square image; None for other kinds of `size`.

    Raises:
        ValueError: it is not made of positive integers.
    """
    if isinstance(size, (int, np.integer)):
        pair: tuple = (size, size)
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        pair = (size[1], size[0])  # (height, width), as image processors take it
    else:
        entries = _entries(size)
        if set(entries) not in ({"shortest_edge"}, {"width", "height"}):
            return None
        pair = tuple(entries.get(name, entries.get("shortest_edge")) for name in ("width", "height"))
    if not all(
        isinstance(length, (int, np.integer)) and not isinstance(length, bool) and length > 0 for length in pair
    ):
        raise ValueError(f"a size of {pair[0]} x {pair[1]}: use positive integers")
    return int(pair[0]), int(pair[1])


def _entries(size: Any) -> dict[str, Any]:
    """The named entries of an image processor's `size`: none where it is a number or a pair."""
    if not hasattr(size, "__iter__") or isinstance(size, (str, list, tuple)):
        return {}
    return {name: value for name, value in dict(size).items() if value is not None}


def output_size(option: Callable[[str], Any]) -> tuple[int, int] | None:
    """
    (width, height) of a square image after the image processor, by its settings; None where they depend on the image.

    Raises:
        ValueError: a size that is not made of positive integers.
    """
    if option("do_center_crop"):
        return square_target(option("crop_size"))
    return square_target(option("size")) if option("do_resize") else None


def levels_of(pixels: Any, option: Callable[[str], Any]) -> np.ndarray:
    """Processed `pixels`, (3, height, width), back on the scale 0..255, without their normalisation; int64."""
    values = np.asarray(pixels.cpu() if isinstance(pixels, torch.Tensor) else pixels, np.float64)
    if option("do_normalize"):
        mean, std = (np.broadcast_to(option(name), 3)[:, None, None] for name in ("image_mean", "image_std"))
        values = values * std + mean
    if option("do_rescale"):
        values = values / option("rescale_factor")
    return np.rint(values).astype(np.int64)


def content_box(
    size: tuple[int, int], shape: Sequence[int], option: Callable[[str], Any]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of an image of (width, height) `size` in its processed square of (height, width) `shape`."""
    height, width = shape
    side = max(size)
    resized = width, height
    if option("do_center_crop"):
        resized = (square_target(option("size")) or resized) if option("do_resize") else (side, side)
    return *_visible(size[1], side, resized[1], height), *_visible(size[0], side, resized[0], width)


def _visible(length: int, side: int, resized: int, shown: int) -> tuple[int, int]:
    """
    Where `length` pixels in the middle of `side` lie once these are `resized`, and `shown` in the middle of that.

    Rounded inwards, as a resized image bleeds into its padding; at least one pixel.
    """
    before = (side - length) // 2 * resized / side - (resized - shown) / 2
    after = before + length * resized / side
    start = min(max(math.ceil(before), 0), shown - 1)
    return start, max(start + 1, min(math.floor(after), shown))


def to_lists(images: Any) -> Any:
    """`images` with generators, columns of data sets and the like as lists, at every level."""
    if isinstance(images, (str, bytes, bytearray, memoryview, Mapping, Image.Image)) or hasattr(images, "read"):
        return images
    is_array = hasattr(images, "dtype") and hasattr(images, "shape") and images.dtype != object
    return images if is_array or not isinstance(images, Iterable) else [to_lists(entry) for entry in images]


def is_nested(images: Any) -> bool:
    """Whether images come as one list per text; None stands for an empty one."""
    return isinstance(images, (list, tuple)) and any(row is None or isinstance(row, (list, tuple)) for row in images)


def flatten_images(images: Any) -> list[Any]:
    """All images of an image, a batch array, a list, or a list of lists, without None."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [] if images is None else [images]
