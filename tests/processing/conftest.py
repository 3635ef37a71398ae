"""A tokenizer of bytes, a small image processor and the processors built of them."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from tests import tiny
from transformers_delta_llava.processing import DeltaLlavaProcessor


BUDGETS = (576, 144, 64, 36, 16, 9, 4, 1)


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return tiny.make_tokenizer


@pytest.fixture
def make_image_processor() -> Callable[..., CLIPImageProcessorPil]:
    return lambda side=28, **options: tiny.make_image_processor(side, **options)


@pytest.fixture
def make_processor(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], make_image_processor: Callable[..., CLIPImageProcessorPil]
) -> Callable[..., DeltaLlavaProcessor]:
    """Processors with 4 visual tokens per image by default, short enough to count by eye."""

    def make(**kwargs: object) -> DeltaLlavaProcessor:
        options = {
            "image_processor": make_image_processor(),
            "tokenizer": make_tokenizer(),
            "num_visual_tokens": 4,
            "visual_token_budgets": BUDGETS,
            **kwargs,
        }
        return DeltaLlavaProcessor(**options)

    return make


@pytest.fixture
def processor(make_processor: Callable[..., DeltaLlavaProcessor]) -> DeltaLlavaProcessor:
    return make_processor()


@pytest.fixture
def make_image() -> Callable[..., Image.Image]:
    """Images with structure at every scale, so that a shift or a wrong filter shows."""

    def make(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
        rows, columns = np.mgrid[0:height, 0:width]
        waves = 127 + 100 * np.sin(rows / 7.0 + seed) * np.cos(columns / 5.0)
        noise = np.random.default_rng(seed).integers(-27, 28, (height, width, 3))
        return Image.fromarray(np.clip(waves[..., None] + noise, 0, 255).astype(np.uint8))

    return make


@pytest.fixture
def raw(
    make_processor: Callable[..., DeltaLlavaProcessor], make_image_processor: Callable[..., CLIPImageProcessorPil]
) -> Callable[..., np.ndarray]:
    """Gives the 8-bit RGB pixels that reach the model, before normalising."""
    image_processor = make_image_processor(do_resize=False, do_center_crop=False, do_normalize=False)
    processor = make_processor(image_processor=image_processor)

    def pixels(image: object, **kwargs: object) -> np.ndarray:
        values = processor(images=[image], return_tensors="np", **kwargs)["pixel_values"][0]
        return np.rint(values * 255).astype(np.uint8).transpose(1, 2, 0)

    return pixels
