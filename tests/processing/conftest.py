"""A tokenizer of bytes, a small image processor and the processors built of them."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from transformers_delta_llava.processing import DeltaLlavaProcessor


BUDGETS = (576, 144, 64, 36, 16, 9, 4, 1)
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SPECIAL += ["<|end|>", "<start_of_turn>", "<end_of_turn>", "<eos>"]


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Byte-level tokenizers: one token per byte, so that every token is known by its characters."""

    def make(
        add_bos: bool = True, padding_side: str = "left", special: list[str] = SPECIAL
    ) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        if add_bos:
            bos = ("<s>", tokenizer.token_to_id("<s>"))
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            padding_side=padding_side,
            model_input_names=["input_ids", "attention_mask"],
        )

    return make


@pytest.fixture
def make_image_processor() -> Callable[..., CLIPImageProcessorPil]:
    """CLIP's image processor at a small size, in the form that needs no torchvision."""

    def make(side: int = 28, **kwargs: object) -> CLIPImageProcessorPil:
        options = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, **kwargs}
        return CLIPImageProcessorPil(**options)

    return make


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
