"""What the pictures of the analysis share: files, colours, letters, and what the vision tower sees."""

import bisect
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..processing import DeltaLlavaProcessor
from ..processing.pictures_delta_llava import levels_of


PAPER, INK, FAINT_INK, LINE = "#ffffff", "#1b1f24", "#6a7380", "#e3e6ea"


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """
    Refuse a file that could not be written, before anything is computed.

    Raises:
        ValueError: its name ends in none of `suffixes`, its folder does not exist or may not be written to, or it is a
            folder itself.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: name a file that ends in {' or '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} may not be written.")


def write_picture(picture: Image.Image, path: Path) -> None:
    """
    Write a picture in the format that the name says: all of it, or nothing.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        picture.save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def tower_view(image: Image.Image, processor: DeltaLlavaProcessor) -> Image.Image:
    """The square that the vision tower sees, padded or cut, as a picture of as many pixels as it has there."""
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    levels = levels_of(pixels, lambda name: getattr(processor.image_processor, name, None))
    return Image.fromarray(levels.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of many scripts where there is one, or Pillow's own."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def wrap(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Lines of `text` of at most `width` pixels: broken at blanks, or anywhere in a word that is longer."""
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if draw.textlength(longer, font) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while len(word) > 1 and draw.textlength(word, font) > width:
                lengths = range(1, min(len(word), 500))
                fits = (
                    bisect.bisect_right(lengths, width, key=lambda n: math.ceil(draw.textlength(word[:n], font))) or 1
                )
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    return lines
