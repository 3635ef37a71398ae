"""Processor of Delta-LLaVA: images become pixel values, each `<image>` as many placeholders as the model fills.

The numbers of visual tokens are data, saved with the processor; the model's configuration counts them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, __version__
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from .auto_budget_delta_llava import budget_losses, pick_budget
from .image_utils_delta_llava import (
    MAX_PIXELS,
    RESCALED,
    content_box,
    cut_to_center,
    flatten_images,
    is_nested,
    levels_of,
    output_size,
    pad_to_square,
    square_target,
    to_lists,
    to_rgb,
)


# The value of `num_visual_tokens` that chooses the number by the image.
AUTO = "auto"
_OWN_OPTIONS = ("num_visual_tokens", "auto_max_loss", "do_pad")
# From 5.23 on transformers allows for expanded placeholders in its assistant masks.
MASKS_EXPANDED_PLACEHOLDERS = tuple(int(number) for number in __version__.split(".")[:2]) >= (5, 23)
# Longer than any context: padding beyond would only fill the memory.
MAX_PADDING = 2**20


class DeltaLlavaImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call that concern images. The processor checks its own, with clearer messages."""

    num_visual_tokens: Any
    auto_max_loss: Any
    do_pad: Any


class DeltaLlavaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call."""

    _defaults = {}  # type: ignore[var-annotated]  # older transformers read it; a TypedDict does not inherit it
    images_kwargs: DeltaLlavaImagesKwargs


class DeltaLlavaProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of a Delta-LLaVA model in one.

    A call takes, besides the usual arguments, `num_visual_tokens` (an integer, `"auto"`, or one of these per image in the
    order of the placeholders: list, tuple, array or tensor), `auto_max_loss` and `do_pad`. It returns `input_ids`,
    `attention_mask`, `pixel_values` of shape (images, 3, height, width), float32, all images of the batch in order, and
    `num_visual_tokens` of shape (images,), int64, only when the number of some image is picked or not the model's default.

    `"auto"` picks for every image the smallest number that loses at most `auto_max_loss` of it: see `image_losses`.

    Images may be of any size and mode: PIL images, arrays and tensors (grey, channels first or last; 8 or 16 bits, or
    floats in 0..1 or 0..255), and what `open_image` reads: paths, URLs, base64, bytes, files, mappings. Each is rotated by its
    EXIF tag and converted to 8-bit RGB; 16-bit and float images are scaled, not clipped. Transparency is dropped
    (`convert("RGB")`), as in the authors' code. Text is padded by the tokenizer: generation needs `padding_side="left"`.

    Args:
        image_processor: Any image processor of transformers (CLIP's, SigLIP's, ...).
        tokenizer: A tokenizer that has `image_token` as one token.
        chat_template (`str` or `dict[str, str]`, *optional*): Jinja template of the conversation format.
        num_visual_tokens (`int`, *optional*, defaults to 144): Visual tokens per image when a call does not say.
            All values of a call are accepted, because engines load the processor with the arguments of a request; other
            values than a single integer need `image_seq_length`.
        visual_token_budgets (`list[int]`, *optional*): The possible numbers of visual tokens: all that the model's grid
            can give, or some of them. `"auto"` picks one of these.
        do_pad (`bool`, *optional*, defaults to `True`): Pad every image to a square with the mean colour.
        image_token (`str`, *optional*, defaults to `"<image>"`): Placeholder of an image.
        image_seq_length (`int`, *optional*): Visual tokens of an image when the model is not told their number: its
            `config.num_visual_tokens`. Defaults to `num_visual_tokens`. It is saved, so it stays what it was when
            `from_pretrained(..., num_visual_tokens=...)` overrides the processor's default.
        auto_max_loss (`float`, *optional*, defaults to 0.3): The share of an image that `"auto"` may lose, from 0 (the
            largest number, unless a smaller one loses nothing) to 1 (the smallest).

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
        auto_max_loss: float = 0.3,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.visual_token_budgets = _check_budgets(visual_token_budgets)
        self.num_visual_tokens = num_visual_tokens
        several = isinstance(num_visual_tokens, (list, tuple))
        for choice in num_visual_tokens if several else [num_visual_tokens]:  # type: ignore[union-attr]
            self._check_choice(choice)
        if image_seq_length is None and (several or num_visual_tokens == AUTO):
            raise ValueError(
                f"`num_visual_tokens={num_visual_tokens!r}` needs `image_seq_length`, the visual tokens per image of the "
                "model's config."
            )
        count: Any = num_visual_tokens if image_seq_length is None else image_seq_length
        if not _is_square(count):
            raise ValueError(f"`image_seq_length` must be a square number, such as 144, not {count!r}.")
        self.image_seq_length = int(count)
        self.auto_max_loss = _check_share(auto_max_loss)
        self.do_pad = _check_flag(do_pad)
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if tokenizer.encode(image_token * 2, add_special_tokens=False) != [self.image_token_id] * 2:
            raise ValueError(
                f"The tokenizer does not take {image_token!r} as one token: add it with "
                f"`tokenizer.add_tokens([{image_token!r}], special_tokens=True)`, and resize the model's embeddings."
            )
        # from_pretrained hands its overrides to the tokenizer too, which would keep them as defaults of every call.
        for name in (*_OWN_OPTIONS, "visual_token_budgets"):
            tokenizer.init_kwargs.pop(name, None)

    @property
    def model_input_names(self) -> list[str]:
        """Names of a call's possible outputs, text first (the Trainer measures lengths by the first)."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "num_visual_tokens"]

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Decode every image to 8-bit RGB, and keep BOS from being added twice."""
        if flatten_images(videos) or flatten_images(audio):
            raise ValueError("DeltaLlavaProcessor takes images and text, no videos and no audio.")
        layout = _call_option(kwargs, "images_kwargs", "input_data_format")
        images = to_lists(images)
        decoded = [to_rgb(image, index, layout) for index, image in enumerate(flatten_images(images))]
        if is_nested(images):
            rest = iter(decoded)
            images = [[next(rest) for _ in flatten_images(row)] for row in images]
        else:
            images = decoded
        if isinstance(text, Iterable) and not isinstance(text, (str, bytes, Mapping)):
            text = list(text)  # a tuple, a generator, a column of a data set
        elif text is not None and not isinstance(text, str):
            raise ValueError(f"`text` must be a string or a list of strings, not of type {type(text).__name__}.")
        images, text, videos, audio = super().prepare_inputs_layout(
            images=images if decoded else None, text=text, videos=videos, audio=audio, **kwargs
        )
        if text and _call_option(kwargs, "text_kwargs", "add_special_tokens") is not False:
            bos, bos_id = self.tokenizer.bos_token, self.tokenizer.bos_token_id
            if bos and self.tokenizer.encode("")[:1] == [bos_id]:
                text = [sample.removeprefix(bos) if isinstance(sample, str) else sample for sample in text]
        return images, text, videos, audio

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Refuse texts and images that do not fit each other, and bad arguments, also of calls without images."""
        if text is not None:
            for row, sample in enumerate(text):
                _check_text(sample, f"text {row}")
            wanted = [sample.count(self.image_token) for sample in text]
            given = [len(row) for row in images] if is_nested(images) else []
            rule = f"The number of {self.image_token} tokens in the prompts should be the same as the number of images"
            if len(given) == len(wanted) and given != wanted:
                row = next(row for row in range(len(wanted)) if given[row] != wanted[row])
                raise ValueError(f"{rule}: text {row} holds {wanted[row]}, but {given[row]} images came for it.")
            if sum(wanted) != len(flatten_images(images)):
                raise ValueError(
                    f"{rule}: the text holds {sum(wanted)}, but {len(flatten_images(images))} images came with it."
                )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        budget, share, flag = (_call_option(kwargs, "images_kwargs", name) for name in _OWN_OPTIONS)
        if budget is not None:
            self.resolve_num_visual_tokens(budget, len(flatten_images(images)) or None)
        if share is not None:
            _check_share(share)
        if flag is not None:
            _check_flag(flag)
        for name in ("max_length", "pad_to_multiple_of"):
            length = _call_option(kwargs, "text_kwargs", name)
            if length is not None and (not isinstance(length, (int, np.integer)) or not 0 <= length <= MAX_PADDING):
                raise ValueError(f"`{name}={length!r}`: use a number of tokens, at most {MAX_PADDING}.")

    def _process_images(
        self,
        images: Any,
        num_visual_tokens: Any = None,
        auto_max_loss: Any = None,
        do_pad: bool | None = None,
        **kwargs: Any,
    ) -> tuple[BatchFeature, list[str]]:
        kwargs.pop("input_data_format", None)  # of what the caller gave; by now every image is RGB
        images = flatten_images(images)
        choices = self.resolve_num_visual_tokens(num_visual_tokens, len(images))
        max_loss = self.auto_max_loss if auto_max_loss is None else float(auto_max_loss)
        sizes = [image.size for image in images]
        padded = self.do_pad if do_pad is None else bool(do_pad)
        kwargs = _with_rescaling(images, kwargs)
        option = partial(self._image_option, kwargs)
        taken = self._check_sizes(option)
        images = [_prepare(image, index, padded, option, taken) for index, image in enumerate(images)]
        image_inputs = self.image_processor(images, **kwargs)
        numbers = [
            pick_budget(self._losses(image_inputs["pixel_values"][index], sizes[index], padded, kwargs), max_loss)
            if choice == AUTO
            else choice
            for index, choice in enumerate(choices)
        ]
        if AUTO in choices or any(number != self.image_seq_length for number in numbers):
            # Only then: without it the model counts by its configuration and compiles without a graph break. What "auto"
            # picks is always returned, else the inputs of two calls could not be batched.
            data = {**image_inputs, "num_visual_tokens": numbers}
            image_inputs = BatchFeature(data, tensor_type=kwargs.get("return_tensors"))
        return image_inputs, [self.replace_image_token(image_inputs, index) for index in range(len(images))]

    def _check_sizes(self, option: Any) -> tuple[int, int] | None:
        """
        (width, height) that the vision tower takes, by the image processor's own settings; None where they leave it open.

        A call that asks for another size is refused here: in the model it would crash an engine, and a huge one the machine.
        """
        taken = output_size(partial(self._image_option, {}))
        asked = output_size(option)
        if taken is not None and asked not in (None, taken):
            raise ValueError(
                f"The settings of this call make images of {asked[0]} x {asked[1]} pixels, but the vision tower takes "
                f"{taken[0]} x {taken[1]}: leave `size`, `crop_size`, `do_resize` and `do_center_crop` as they are."
            )
        between = square_target(option("size")) if option("do_resize") else None
        if between is not None and between[0] * between[1] > MAX_PIXELS:
            raise ValueError(f"`size` of {between[0]} x {between[1]} is too large: leave it as it is.")
        return taken

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
        choices = self.resolve_num_visual_tokens(
            _call_option(kwargs, "images_kwargs", "num_visual_tokens"), len(image_sizes)
        )
        most = [max(self.visual_token_budgets) if choice == AUTO else choice for choice in choices]
        return MultiModalData(num_image_tokens=most, num_image_patches=[1] * len(image_sizes))

    def image_losses(self, images: Any, **kwargs: Any) -> list[dict[int, float]]:
        """
        For each image the share, from 0 to 1, that it would lose at every number of visual tokens; `"auto"` decides by it.

        The loss is the share of the variance between mean colours of the windows of the largest number that is gone
        between the larger windows of this one. Padding does not count. See `budget_losses` for the formula.

        Args:
            images: as in a call; `kwargs` are a call's arguments that concern images (`do_pad`, ...).

        Raises:
            ValueError: for an unreadable image.
        """
        images, *_ = self.prepare_inputs_layout(images=images, **kwargs)
        if images is None:
            return []
        images = flatten_images(images)
        pixels = self(images=images, **{**kwargs, "num_visual_tokens": max(self.visual_token_budgets)})["pixel_values"]
        options = _with_rescaling(images, {**kwargs, **(kwargs.get("images_kwargs") or {})})
        padded = self.do_pad if options.get("do_pad") is None else bool(options["do_pad"])
        return [self._losses(pixels[index], image.size, padded, options) for index, image in enumerate(images)]

    def _losses(self, pixels: Any, size: tuple[int, int], padded: bool, kwargs: dict[str, Any]) -> dict[int, float]:
        """Losses of an image from its processed `pixels`, (3, height, width), and the (width, height) it came in."""
        option = partial(self._image_option, kwargs)
        levels = levels_of(pixels, option)
        content = content_box(size, levels.shape[1:], option) if padded else None
        return budget_losses(levels, self.visual_token_budgets, content)

    def _image_option(self, kwargs: dict[str, Any], name: str) -> Any:
        """An argument of the image processor: of this call, or else its own. `kwargs` are the call's."""
        return kwargs[name] if kwargs.get(name) is not None else getattr(self.image_processor, name, None)

    def resolve_num_visual_tokens(self, num_visual_tokens: Any, num_images: int | None = None) -> list[int | str]:
        """
        One number or `"auto"` per image, from the argument of a call.

        Args:
            num_visual_tokens: as in a call; the processor's default when `None`.
            num_images: how many images there are; by default a list may have any length.

        Raises:
            ValueError: for a number that the model does not have, or another number of entries than of images.
        """
        if num_visual_tokens is None:
            num_visual_tokens = self.num_visual_tokens
        if isinstance(num_visual_tokens, (np.ndarray, torch.Tensor)):
            num_visual_tokens = num_visual_tokens.tolist()
        if not isinstance(num_visual_tokens, (list, tuple)):
            return [self._check_choice(num_visual_tokens)] * (num_images or 0)
        if num_images is not None and len(num_visual_tokens) != num_images:
            raise ValueError(
                f"`num_visual_tokens` has {len(num_visual_tokens)} entries for {num_images} images: give one integer "
                "for all of them, or one for each."
            )
        return [self._check_choice(choice) for choice in num_visual_tokens]

    def _check_choice(self, choice: Any) -> int | str:
        if isinstance(choice, str) and choice == AUTO:
            return AUTO
        if isinstance(choice, bool) or not isinstance(choice, (int, np.integer)):
            raise ValueError(f"`num_visual_tokens` must be an integer or 'auto', or one per image, not {choice!r}.")
        if choice not in self.visual_token_budgets:
            budgets = ", ".join(map(str, self.visual_token_budgets))
            raise ValueError(f"num_visual_tokens={choice}: this model cannot give it; use one of {budgets}.")
        return int(choice)

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; on releases whose assistant masks ignore expanded placeholders, the mask is computed here.

        Raises:
            ValueError: as a call, and for a conversation that is empty, has no messages, or that the template refuses.
        """
        if isinstance(conversation, Iterable) and not isinstance(conversation, (list, tuple, str, bytes, Mapping)):
            conversation = list(conversation)  # a generator would be read twice
        _check_conversations(conversation)
        try:
            return self._apply_chat_template(conversation, chat_template, *args, **kwargs)
        except Exception as error:
            # By name: Jinja2 is imported by transformers, and not here.
            if any(kind.__name__ == "TemplateError" for kind in type(error).__mro__):
                raise ValueError(f"The chat template refuses the conversation: {error}") from error
            raise

    def _apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
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


def _call_option(kwargs: dict[str, Any], group: str, name: str) -> Any:
    """An argument of a call, given flat or in its group."""
    return kwargs[name] if name in kwargs else (kwargs.get(group) or {}).get(name)


def _prepare(image: Image.Image, index: int, padded: bool, option: Any, taken: tuple[int, int] | None) -> Image.Image:
    """Image number `index` of a call as the image processor gets it; `taken` is the (width, height) of the vision tower."""
    try:
        image = pad_to_square(image, option) if padded else cut_to_center(image, option)
        if taken is not None and not (option("do_resize") or option("do_center_crop")) and image.size != taken:
            raise ValueError(
                f"it is of {image.width} x {image.height} pixels, the vision tower takes {taken[0]} x {taken[1]}; leave "
                "out `do_resize=False`"
            )
    except ValueError as error:
        raise ValueError(f"Image {index} cannot be used: {error}.") from error
    return image


def _with_rescaling(images: list[Image.Image], kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    `kwargs`, with the `do_rescale` that the `images` need as 8 bits.

    A caller's `do_rescale=False` means that floats are in 0..1 already; here they are 8 bits like all others.
    """
    floats = [image.info.get(RESCALED, False) for image in images]
    if kwargs.get("do_rescale") is not False or not any(floats):
        return kwargs
    if not all(floats):
        raise ValueError(
            f"With `do_rescale=False` image {floats.index(True)} is floats in 0..1, but image {floats.index(False)} is "
            "not: give them in calls of their own."
        )
    return {**kwargs, "do_rescale": True}


def _check_conversations(conversation: Any) -> None:
    """Refuse malformed conversations before transformers or a template fails on them."""
    if hasattr(conversation, "messages"):
        return  # transformers' own Chat
    if not isinstance(conversation, (list, tuple)):
        raise ValueError(f"A conversation is a list of messages, not of type {type(conversation).__name__}.")
    if not conversation:
        raise ValueError("The conversation is empty: give at least one message.")
    if any(isinstance(entry, (list, tuple)) for entry in conversation):
        for entry in conversation:
            if not isinstance(entry, (list, tuple)) or not entry:
                raise ValueError("Each conversation of a batch must be a list of messages, and not empty.")
            _check_conversations(entry)
        return
    for index, message in enumerate(conversation):
        if isinstance(message, Mapping):
            _check_message(message, index)
        elif not hasattr(message, "role"):
            raise ValueError(f"Message {index} must have a role and content, but is of type {type(message).__name__}.")


def _check_message(message: Mapping, index: int) -> None:
    if not isinstance(message.get("role"), str):
        raise ValueError(f"Message {index} has no `role`, such as 'user'.")
    content = message.get("content")
    if not isinstance(content, (str, list, tuple)) and not (content is None and message.get("tool_calls")):
        raise ValueError(
            "The chat template refuses the conversation: Message content must be a string or a list of text and image items."
        )
    if isinstance(content, str):
        _check_text(content, f"the content of message {index}")
    if not isinstance(content, (list, tuple)):
        return
    for item in content:
        if not isinstance(item, Mapping) or not isinstance(item.get("type"), str):
            raise ValueError(
                "The chat template refuses the conversation: Only content of type text and image is known, "
                f"not: {str(item)[:200]}"
            )
        if item["type"] == "text":
            _check_text(item.get("text"), f"a text of message {index}")


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name[0].upper()}{name[1:]} must be a string, not of type {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name[0].upper()}{name[1:]} holds half a character (a lone surrogate).") from error


def _check_budgets(budgets: Any) -> list[int]:
    numbers = tuple(budgets) if isinstance(budgets, (list, tuple)) else ()
    if not numbers or not all(map(_is_square, numbers)):
        raise ValueError(
            f"`visual_token_budgets` must be a list of square numbers, such as [144, 36, 4], not {budgets!r}."
        )
    return list(map(int, numbers))


def _is_square(number: Any) -> bool:
    whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    return bool(whole and number > 0 and isqrt(int(number)) ** 2 == number)


def _check_flag(flag: Any) -> bool:
    if not isinstance(flag, (bool, np.bool_)):
        raise ValueError(f"`do_pad` must be True or False, not {flag!r}.")
    return bool(flag)


def _check_share(share: Any) -> float:
    if isinstance(share, bool) or not isinstance(share, (int, float, np.number)) or not 0 <= share <= 1:
        raise ValueError(f"`auto_max_loss` must be a number from 0 to 1, not {share!r}.")
    return float(share)
