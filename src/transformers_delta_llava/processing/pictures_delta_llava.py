"""Pictures before the image processor: whatever they come as, decoded to upright 8-bit RGB, and padded to a square."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import load_image


# Rows of a padded picture are resized in strips of about this many pixels, whatever the shape of the picture.
STRIP_PIXELS = 2**22
# Seconds that a URL may keep silent; by default it may for ever, and a server waits with it.
URL_TIMEOUT = 30.0


def to_rgb(image: Any, index: int, layout: Any = None, rescaled: bool = False) -> Image.Image:
    """Image number `index` of a call as an upright 8-bit RGB picture, or a ValueError that names it."""
    try:
        if isinstance(image, (str, os.PathLike)):
            # A file is opened here, as `load_image` (which fetches URLs and base64) clips 16-bit pictures.
            image = Image.open(image) if os.path.isfile(image) else load_image(image, timeout=URL_TIMEOUT)
        if isinstance(image, (np.ndarray, torch.Tensor)):
            image = _from_array(image, layout, rescaled)
        if not isinstance(image, Image.Image):
            raise TypeError(f"it is of type {type(image).__name__}, not a picture, an array, a path or a URL")
        if 0 in image.size:
            raise ValueError(f"it is empty ({image.width} x {image.height})")
        image.load()  # what is wrong with a file shows here
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # without a turn Pillow would make a copy
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image)
            if image.mode == "I" and values.min() >= 0 and values.max() < 2**16:
                values = values.astype(np.uint16)  # "I" is how older Pillow opens 16-bit files, newer as "I;16"
            image = Image.fromarray(_to_bytes(values, stretch=True))
        if image.mode in ("RGBa", "La"):
            image = image.convert(image.mode.upper())
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # whatever Pillow, the file system or the network raises
        raise ValueError(f"Image {index} cannot be used: {str(error)[:300]}") from error


def _from_array(image: Any, layout: Any = None, rescaled: bool = False) -> Image.Image:
    """An array or tensor, (H, W), (H, W, C) or (C, H, W), as an 8-bit picture; in doubt tensors are (C, H, W)."""
    is_tensor = isinstance(image, torch.Tensor)
    if is_tensor:
        image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
    if image.size == 0:
        raise ValueError(f"it is empty (shape {image.shape})")
    if rescaled and image.dtype.kind == "f":
        raise ValueError("floats are brought to 0..255 here, so `do_rescale=False` does not fit them")
    if image.ndim == 3:
        first, last = image.shape[0] in (1, 3, 4), image.shape[-1] in (1, 3, 4)
        if layout == "channels_first" or (layout is None and first and (is_tensor or not last)):
            image = np.moveaxis(image, 0, -1)
        if image.shape[-1] in (1, 3, 4):
            image = image[..., 0] if image.shape[-1] == 1 else image[..., :3]
            return Image.fromarray(np.ascontiguousarray(_to_bytes(image)))
    if image.ndim == 2:
        return Image.fromarray(_to_bytes(image))
    raise ValueError(f"its shape {image.shape} is none of (H, W), (H, W, C), (C, H, W) with 1, 3 or 4 channels")


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
        start, stop = low, high if high > low else low + 1.0
    return np.rint((values.astype(np.float64) - start) * (255.0 / (stop - start))).astype(np.uint8)


def pad_to_square(image: Image.Image, option: Callable[[str], Any]) -> Image.Image:
    """
    `image` in the middle of a square of the mean colour, resized already where the image processor will do so.

    Source: "pad" of the authors' code: colour `int(mean * 255)` per channel, offset rounded down. Pillow resizes
    horizontally, then vertically, with 8 bits in between. So the square can be resized strip by strip, to the same
    bits: a picture of 10000 x 10 never becomes one of 10000 x 10000. `option` gives the image processor's settings by name.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    mean = option("image_mean")
    colour = tuple(int(channel * 255) for channel in np.broadcast_to(0.0 if mean is None else mean, 3))
    size, resample = square_target(option("size")), option("resample")
    if not option("do_resize") or size is None or not isinstance(resample, int):
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, (left, top))
        return square
    narrow = Image.new("RGB", (size[0], side), colour)
    rows = max(1, STRIP_PIXELS // side)
    for start in range(0, image.height, rows):
        stop = min(start + rows, image.height)
        strip = Image.new("RGB", (side, stop - start), colour)
        strip.paste(image.crop((0, start, image.width, stop)), (left, 0))
        narrow.paste(strip.resize((size[0], stop - start), resample), (0, top + start))
    return narrow.resize(size, resample)


def square_target(size: Any) -> tuple[int, int] | None:
    """(width, height) that an image processor's `size` gives a square picture; None where that takes more thought."""
    size = dict(size) if hasattr(size, "__iter__") else {}
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"], size["shortest_edge"]
    return (size["width"], size["height"]) if set(size) == {"width", "height"} else None


def levels_of(pixels: Any, option: Callable[[str], Any]) -> np.ndarray:
    """Processed `pixels`, (3, height, width), back on the scale 0..255, whatever they were normalised by; int64."""
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
    """(top, bottom, left, right) of a picture of (width, height) `size` in what is left of its square, (height, width)."""
    height, width = shape
    side = max(size)
    resized = width, height
    if option("do_center_crop"):
        resized = (square_target(option("size")) or resized) if option("do_resize") else (side, side)
    return *_visible(size[1], side, resized[1], height), *_visible(size[0], side, resized[0], width)


def _visible(length: int, side: int, resized: int, shown: int) -> tuple[int, int]:
    """
    Where `length` pixels in the middle of `side` lie once these are `resized`, and `shown` in the middle of that.

    Rounded inwards, as a resized picture bleeds into its padding; at least one pixel.
    """
    before = (side - length) // 2 * resized / side - (resized - shown) / 2
    after = before + length * resized / side
    start = min(max(math.ceil(before), 0), shown - 1)
    return start, max(start + 1, min(math.floor(after), shown))
