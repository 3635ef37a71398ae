# Copyright 2026 The transformers-delta-llava authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the License.
# You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS"
# BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Processor of Delta-LLaVA: images become pixel values, and each `<image>` as many placeholders as the image gets tokens.

The numbers of visual tokens are data, saved with the processor; the model's configuration counts them.
"""

import re
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, __version__
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .auto_budget_delta_llava import detail_kept, pick_budget


# From 5.23 on, transformers shifts assistant masks when placeholders are expanded.
MASKS_EXPANDED_PLACEHOLDERS = tuple(int(number) for number in __version__.split(".")[:2]) >= (5, 23)
# A longer image is refused: the square around it would take gigabytes, nearly all of it padding.
MAX_SIDE = 2**14


class DeltaLlavaImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call that concern images."""

    num_visual_tokens: Any
    auto_min_detail: float | int | None
    do_pad: bool | None
    numbers_per_image: bool | None


class DeltaLlavaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call."""

    _defaults = {}  # type: ignore[var-annotated]  # older transformers read it; a TypedDict does not inherit it
    images_kwargs: DeltaLlavaImagesKwargs


class DeltaLlavaProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of a Delta-LLaVA model in one.

    A call takes, besides the usual arguments, `num_visual_tokens` (an integer, `"auto"`, `"low"`, `"high"`, or one of these
    per image in the order of the placeholders: list, tuple, array or tensor), `auto_min_detail` and `do_pad`. It returns
    `input_ids`, `attention_mask`, `pixel_values` of shape (images, 3, height, width), float32, all images of the batch in
    order, and `num_visual_tokens` of shape (images,), int64, only when the number of some image is picked or not the
    model's default.

    `"auto"` picks for every image the smallest number that keeps `auto_min_detail` of its detail, see `image_detail`;
    `"low"` is the smallest number of at least 4, `"high"` the largest, as the `detail` of images in OpenAI's API.

    Images are what `transformers.image_utils.load_image` takes, arrays and tensors. Each is rotated by its EXIF tag and
    converted to 8-bit RGB; transparency is dropped, as in the authors' code. Text is padded by the tokenizer: generation
    needs `padding_side="left"`.

    Args:
        image_processor: Any image processor of transformers (CLIP's, SigLIP's, ...).
        tokenizer: A tokenizer that has `image_token` as one token.
        chat_template (`str` or `dict[str, str]`, *optional*): Jinja template of the conversation format.
        num_visual_tokens (`int`, *optional*, defaults to 144): Visual tokens per image when a call does not say. All values
            of a call are accepted, because engines load the processor with the arguments of a request; other values than
            a single integer need `image_seq_length`, and different numbers `numbers_per_image=True` in the call.
        visual_token_budgets (`list[int]`, *optional*): The possible numbers of visual tokens: all that the model's grid
            can give, or some of them.
        do_pad (`bool`, *optional*, defaults to `True`): Pad every image to a square with the mean colour.
        image_token (`str`, *optional*, defaults to `"<image>"`): Placeholder of an image.
        image_seq_length (`int`, *optional*): Visual tokens of an image when the model is not told their number: its
            `config.num_visual_tokens`. Defaults to `num_visual_tokens`. It is saved, so it stays what it was when
            `from_pretrained(..., num_visual_tokens=...)` overrides the processor's default.
        auto_min_detail (`float`, *optional*, defaults to 0.7): The share of an image's detail that `"auto"` keeps.

    Raises:
        ValueError: For a number that the model does not have, images that do not fit the text, an unreadable image.
    """

    valid_processor_kwargs = DeltaLlavaProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        num_visual_tokens: int | str | list[int | str] = 144,
        visual_token_budgets: Sequence[int] = (576, 144, 64, 36, 16, 9, 4, 1),
        do_pad: bool = True,
        image_token: str = "<image>",
        image_seq_length: int | None = None,
        auto_min_detail: float = 0.7,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.visual_token_budgets = list(visual_token_budgets)
        self.num_visual_tokens, self.do_pad, self.auto_min_detail = num_visual_tokens, do_pad, auto_min_detail
        self.image_seq_length: Any = num_visual_tokens if image_seq_length is None else image_seq_length
        if not isinstance(self.image_seq_length, int):
            raise ValueError(f"num_visual_tokens={num_visual_tokens!r} needs image_seq_length, the model's own number")
        self.resolve_num_visual_tokens(num_visual_tokens)
        self.image_token, self.image_token_id = image_token, tokenizer.convert_tokens_to_ids(image_token)
        if tokenizer.encode(image_token * 2, add_special_tokens=False) != [self.image_token_id] * 2:
            raise ValueError(
                f"{image_token!r} is not one token; use tokenizer.add_tokens([{image_token!r}], special_tokens=True)"
            )
        # from_pretrained hands its overrides to the tokenizer too, which would keep them as defaults of every call.
        for name in ("num_visual_tokens", "visual_token_budgets", "auto_min_detail", "do_pad"):
            tokenizer.init_kwargs.pop(name, None)

    @property
    def model_input_names(self) -> list[str]:
        """Names of a call's possible outputs, text first (the Trainer measures lengths by the first)."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "num_visual_tokens"]

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
        """As in the base class. Images become a flat list of upright 8-bit RGB images, and BOS is not added twice."""
        flat = [_to_rgb(image) for image in _flatten(images)]
        text = list(text) if isinstance(text, tuple) else text
        images, text, videos, audio = super().prepare_inputs_layout(images=flat or None, text=text, **kwargs)
        add_special_tokens = {**(kwargs.get("text_kwargs") or {}), **kwargs}.get("add_special_tokens", True)
        bos = self.tokenizer.bos_token
        if text and bos and add_special_tokens and self.tokenizer.encode("")[:1] == [self.tokenizer.bos_token_id]:
            text = [sample.removeprefix(bos) for sample in text]
        return images, text, videos, audio

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """As in the base class, which does not count images in all releases."""
        super().validate_inputs(images=images, text=text, **kwargs)
        placeholders, given = sum(sample.count(self.image_token) for sample in text or []), len(images or [])
        if text is not None and placeholders != given:
            raise ValueError(f"the texts have {placeholders} {self.image_token}, and {given} images were passed")

    def _process_images(
        self,
        images: Any,
        num_visual_tokens: Any = None,
        auto_min_detail: float | None = None,
        do_pad: bool | None = None,
        numbers_per_image: bool | None = False,
        **kwargs: Any,
    ) -> tuple[BatchFeature, list[str]]:
        default = self.num_visual_tokens
        if isinstance(default, (list, tuple)) and len(set(default)) > 1 and not numbers_per_image:
            # vLLM loads the processor with the arguments of a request. Its cache finds images by their content and these
            # arguments, not by their place in the list, so the same images in another order would get wrong numbers.
            raise ValueError(
                f"num_visual_tokens={list(default)}: different numbers in one request need an engine without a cache of "
                "processed images, that is started with numbers_per_image=True"
            )
        choices = self.resolve_num_visual_tokens(num_visual_tokens, len(images))
        min_detail = self.auto_min_detail if auto_min_detail is None else auto_min_detail
        numbers = [
            pick_budget(detail_kept(image, self.visual_token_budgets), min_detail) if choice == "auto" else choice
            for image, choice in zip(images, choices)
        ]
        if self.do_pad if do_pad is None else do_pad:
            mean = kwargs.get("image_mean") or getattr(self.image_processor, "image_mean", None) or 0.0
            images = [_to_square(image, mean) for image in images]
        inputs = self.image_processor(images, **kwargs)
        if "auto" in choices or any(number != self.image_seq_length for number in numbers):
            # Only then: without it the model counts by its configuration and compiles without a graph break. What "auto"
            # picks is always returned, else the inputs of two calls could not be batched.
            inputs = BatchFeature({**inputs, "num_visual_tokens": numbers}, tensor_type=kwargs.get("return_tensors"))
        return inputs, [self.replace_image_token(inputs, index) for index in range(len(images))]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of image number `image_idx` among the processed `image_inputs`."""
        numbers = image_inputs.get("num_visual_tokens")
        return self.image_token * (self.image_seq_length if numbers is None else int(numbers[image_idx]))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """
        Placeholders and rows of `pixel_values` for images of these (height, width); engines plan with them.

        For `"auto"` the largest possible number, as a size does not say what it will pick.
        """
        if image_sizes is None:
            return MultiModalData()
        given = {**(kwargs.get("images_kwargs") or {}), **kwargs}.get("num_visual_tokens")
        choices = self.resolve_num_visual_tokens(given, len(image_sizes))
        most = [max(self.visual_token_budgets) if choice == "auto" else choice for choice in choices]
        return MultiModalData(num_image_tokens=most, num_image_patches=[1] * len(image_sizes))

    def image_detail(self, images: Any) -> list[dict[int, float]]:
        """For each image the share of its detail, from 0 to 1, that every number of visual tokens keeps; see `detail_kept`.

        Args:
            images: as in a call.
        """
        return [detail_kept(_to_rgb(image), self.visual_token_budgets) for image in _flatten(images)]

    def resolve_num_visual_tokens(
        self, num_visual_tokens: Any = None, num_images: int | None = None
    ) -> list[int | str]:
        """
        One number or `"auto"` per image, from the argument of a call.

        Args:
            num_visual_tokens: as in a call; the processor's default when `None`.
            num_images: how many images there are; by default a list may have any length.

        Raises:
            ValueError: for a number that the model does not have, or another number of entries than of images.
        """
        given = self.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
        given = given.tolist() if isinstance(given, (np.ndarray, torch.Tensor)) else given
        choices = (
            list(given) if isinstance(given, (list, tuple)) else [given] * (1 if num_images is None else num_images)
        )
        if num_images is not None and len(choices) != num_images:
            raise ValueError(f"num_visual_tokens has {len(choices)} entries for {num_images} images")
        return [self._resolve(choice) for choice in choices]

    def _resolve(self, choice: Any) -> int | str:
        budgets = self.visual_token_budgets
        if isinstance(choice, str) and choice in ("auto", "low", "high"):
            smallest = min((budget for budget in budgets if budget >= 4), default=min(budgets))
            return smallest if choice == "low" else max(budgets) if choice == "high" else choice
        if not isinstance(choice, (int, np.integer)) or isinstance(choice, bool) or choice not in budgets:
            known = ", ".join(map(str, budgets))
            raise ValueError(f"num_visual_tokens={choice!r} is not supported; choose from {known}, auto, low, high")
        return int(choice)

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the base class; before transformers 5.23 the assistant mask is computed here."""
        wanted = all(kwargs.get(name) for name in ("return_assistant_tokens_mask", "tokenize", "return_dict"))
        if not wanted or MASKS_EXPANDED_PLACEHOLDERS:
            return super().apply_chat_template(conversation, chat_template, *args, **kwargs)
        # Only the older releases reach this import.
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {**kwargs, **(kwargs.pop("processor_kwargs", None) or {}), "processor_kwargs": None}
        options.update(return_offsets_mapping=True, return_assistant_tokens_mask=False, return_tensors=None)
        inputs = super().apply_chat_template(conversation, chat_template, *args, **options)
        if isinstance(self.chat_template, dict):
            chat_template = self.chat_template.get(chat_template or "default", chat_template)
        batch = conversation if isinstance(conversation[0], (list, tuple)) else [conversation]
        variables = {**self.tokenizer.special_tokens_map, **kwargs, "conversations": batch}
        prompts, spans = render_jinja_template(**variables, chat_template=chat_template or self.chat_template)
        numbers = iter(inputs.get("num_visual_tokens", repeat(self.image_seq_length)))
        inputs["assistant_masks"] = []
        for prompt, row, offsets in zip(prompts, spans, inputs.pop("offset_mapping"), strict=True):
            # The spans are in the prompt before its placeholders were expanded. A character moves by the growth of every
            # placeholder that ends before it.
            ends = [match.end() for match in re.finditer(re.escape(self.image_token), prompt)]
            growths = [(end, (next(numbers) - 1) * len(self.image_token)) for end in ends]
            row = [[i + sum(growth for end, growth in growths if end <= i) for i in span] for span in row]
            mask = [int(any(left < stop and right > start for start, stop in row)) for left, right in offsets]
            inputs["assistant_masks"].append(mask)
        return inputs.convert_to_tensors(kwargs.get("return_tensors"))


def _flatten(images: Any) -> list[Any]:
    """All images of an image, a batch array, a list, or a list of lists, in which rows may be empty or `None`."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flatten(entry)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [] if images is None else [images]


def _to_rgb(image: Any) -> Image.Image:
    """A PIL image, array, tensor, path, URL or base64 text as an upright 8-bit RGB image."""
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = to_pil_image(image if image.ndim == 3 else image[..., None])
    if not isinstance(image, Image.Image):
        image = load_image(image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning
    return image.convert("RGB")


def _to_square(image: Image.Image, mean: Any) -> Image.Image:
    """
    `image` in the middle of a square of the mean colour.

    Source: "pad" of the authors' code: colour `int(mean * 255)` per channel, offset rounded down.
    """
    side = max(image.size)
    if side > MAX_SIDE:
        raise ValueError(
            f"an image of {image.width} x {image.height} is too long to pad; resize it to {MAX_SIDE} pixels"
        )
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in np.broadcast_to(mean, 3)))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
