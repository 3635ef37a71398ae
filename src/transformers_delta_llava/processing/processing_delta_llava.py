"""Processor of Delta-LLaVA: pictures become pixel values, each `<image>` as many placeholders as the model fills.

How many that is, is never computed here: it is data, saved with the processor and made by the configuration's
one counting function.
"""

import os
import re
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers import BatchFeature
from transformers.image_utils import load_image, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template


# Rows of a padded picture are resized in strips of about this many pixels, whatever the shape of the picture.
STRIP_PIXELS = 2**22


class DeltaLlavaImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call that concern images. The processor checks `num_visual_tokens` itself, in clearer words."""

    num_visual_tokens: Any


class DeltaLlavaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call."""

    _defaults = {}  # type: ignore[var-annotated]  # older transformers read it; a TypedDict does not inherit it
    images_kwargs: DeltaLlavaImagesKwargs


class DeltaLlavaProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of a Delta-LLaVA model in one.

    A call takes, besides the usual arguments, `num_visual_tokens` (an integer, or one per image in the order of the
    placeholders: list, tuple, array or tensor) and `do_pad`. It returns `input_ids`, `attention_mask`,
    `pixel_values` of shape (images, 3, height, width), float32, all images of the batch in order, and
    `num_visual_tokens` of shape (images,), int64, only when some image's budget is not the model's default.

    Images may be of any size and mode: PIL images, arrays and tensors (grey, channels first or last; 8 or 16 bits, or
    floats in 0..1 or 0..255), paths, URLs. Each is turned as its EXIF tag says and brought to 8-bit RGB; 16-bit and
    float pictures are scaled, not clipped. Transparency is dropped (`convert("RGB")`), as in the authors' code.
    Padding of text is the tokenizer's affair (`padding_side`): generation wants it on the left.

    Args:
        image_processor: Any image processor of transformers (CLIP's, SigLIP's, ...).
        tokenizer: A tokenizer that has `image_token` as one token.
        chat_template (`str` or `dict[str, str]`, *optional*): Jinja template of the conversation format.
        num_visual_tokens (`int`, *optional*, defaults to 144): Visual tokens per image when a call does not say.
            One integer per image is taken too: engines load the processor with the arguments of a request.
        visual_token_budgets (`list[int]`, *optional*): Budgets that the model's grid can give.
        do_pad (`bool`, *optional*, defaults to `True`): Pad every image to a square with the mean colour.
        image_token (`str`, *optional*, defaults to `"<image>"`): Placeholder of an image.
        image_seq_length (`int`, *optional*): Visual tokens of an image when the model is not told their number: its
            `config.image_seq_length`. Defaults to `num_visual_tokens`. It is saved, so it stays what it was when
            `from_pretrained(..., num_visual_tokens=...)` overrides the processor's default.

    Raises:
        ValueError: For a budget the model does not have, images that do not fit the text, an image that is unreadable.
    """

    valid_processor_kwargs = DeltaLlavaProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        num_visual_tokens: int | list[int] = 144,
        visual_token_budgets: Sequence[int] = (576, 144, 64, 36, 16, 9, 4, 1),
        do_pad: bool = True,
        image_token: str = "<image>",
        image_seq_length: int | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.visual_token_budgets = tuple(visual_token_budgets)
        self.num_visual_tokens = num_visual_tokens
        self.image_seq_length = self._check_budget(num_visual_tokens if image_seq_length is None else image_seq_length)
        for budget in num_visual_tokens if isinstance(num_visual_tokens, (list, tuple)) else [num_visual_tokens]:
            self._check_budget(budget)
        self.do_pad = do_pad
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if tokenizer.encode(image_token * 2, add_special_tokens=False) != [self.image_token_id] * 2:
            raise ValueError(
                f"The tokenizer does not take {image_token!r} as one token: add it with "
                f"`tokenizer.add_tokens([{image_token!r}], special_tokens=True)`, and resize the model's embeddings."
            )
        # from_pretrained hands its overrides to the tokenizer too, which would keep them as defaults of every call.
        for name in ("num_visual_tokens", "do_pad"):
            tokenizer.init_kwargs.pop(name, None)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call may return for the model, text first (the Trainer measures lengths by the first)."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, "num_visual_tokens"]

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Decode every image, whatever it came as, to 8-bit RGB, and keep BOS from being added twice."""
        if _flatten(videos) or _flatten(audio):
            raise ValueError("DeltaLlavaProcessor takes images and text, no videos and no audio.")
        layout = _call_option(kwargs, "images_kwargs", "input_data_format")
        rescaled = _call_option(kwargs, "images_kwargs", "do_rescale") is False
        decoded = [_to_rgb(image, index, layout, rescaled) for index, image in enumerate(_flatten(images))]
        if _is_nested(images):
            rest = iter(decoded)
            images = [[next(rest) for _ in _flatten(row)] for row in images]
        else:
            images = decoded
        if isinstance(text, tuple):
            text = list(text)
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
        """Refuse texts and images that do not belong together."""
        if text is not None:
            if not isinstance(text, list) or not all(isinstance(sample, str) for sample in text):
                raise ValueError("`text` must be a string or a list of strings.")
            wanted = [sample.count(self.image_token) for sample in text]
            given = [len(row) for row in images] if _is_nested(images) else []
            rule = f"The number of {self.image_token} tokens in the prompts should be the same as the number of images"
            if len(given) == len(wanted) and given != wanted:
                row = next(row for row in range(len(wanted)) if given[row] != wanted[row])
                raise ValueError(f"{rule}: text {row} holds {wanted[row]}, but {given[row]} images came for it.")
            if sum(wanted) != len(_flatten(images)):
                raise ValueError(
                    f"{rule}: the text holds {sum(wanted)}, but {len(_flatten(images))} images came with it."
                )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_images(
        self, images: Any, num_visual_tokens: Any = None, do_pad: bool | None = None, **kwargs: Any
    ) -> tuple[BatchFeature, list[str]]:
        kwargs.pop("input_data_format", None)  # of what the caller gave; by now every image is RGB
        images = make_flat_list_of_images(images)
        budgets = self._resolve_budgets(num_visual_tokens, len(images))
        if self.do_pad if do_pad is None else do_pad:
            images = [self._pad_to_square(image, kwargs) for image in images]
        image_inputs = self.image_processor(images, **kwargs)
        if any(budget != self.image_seq_length for budget in budgets):
            # Not otherwise: a model that counts by its configuration alone compiles without a break in the graph.
            data = {**image_inputs, "num_visual_tokens": budgets}
            image_inputs = BatchFeature(data, tensor_type=kwargs.get("return_tensors"))
        return image_inputs, [self.replace_image_token(image_inputs, index) for index in range(len(images))]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of image number `image_idx` among the processed `image_inputs`."""
        budgets = image_inputs.get("num_visual_tokens")
        return self.image_token * (self.image_seq_length if budgets is None else int(budgets[image_idx]))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Placeholders and rows of `pixel_values` for images of these (height, width): what engines plan with."""
        if image_sizes is None:
            return MultiModalData()
        budgets = self._resolve_budgets(_call_option(kwargs, "images_kwargs", "num_visual_tokens"), len(image_sizes))
        return MultiModalData(num_image_tokens=budgets, num_image_patches=[1] * len(image_sizes))

    def _resolve_budgets(self, num_visual_tokens: Any, num_images: int) -> list[int]:
        if num_visual_tokens is None:
            num_visual_tokens = self.num_visual_tokens
        if isinstance(num_visual_tokens, (np.ndarray, torch.Tensor)):
            num_visual_tokens = num_visual_tokens.tolist()
        if not isinstance(num_visual_tokens, (list, tuple)):
            return [self._check_budget(num_visual_tokens)] * num_images
        if len(num_visual_tokens) != num_images:
            raise ValueError(
                f"`num_visual_tokens` has {len(num_visual_tokens)} entries for {num_images} images: give one integer "
                "for all of them, or one for each."
            )
        return [self._check_budget(budget) for budget in num_visual_tokens]

    def _check_budget(self, budget: Any) -> int:
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)):
            raise ValueError(f"`num_visual_tokens` must be an integer, or one per image, not {budget!r}.")
        if budget not in self.visual_token_budgets:
            choices = ", ".join(str(choice) for choice in self.visual_token_budgets)
            raise ValueError(f"`num_visual_tokens={budget}` is not a budget of this model; it has {choices}.")
        return int(budget)

    def _pad_to_square(self, image: Image.Image, kwargs: dict[str, Any]) -> Image.Image:
        """
        `image` in the middle of a square of the mean colour, resized already where the image processor will do so.

        Source: "pad" of the authors' code: colour `int(mean * 255)` per channel, offset rounded down. Pillow resizes
        horizontally, then vertically, with 8 bits in between. So the square can be resized strip by strip, to the same
        bits: a picture of 10000 x 10 never becomes one of 10000 x 10000.
        """

        def option(name: str) -> Any:
            return kwargs[name] if kwargs.get(name) is not None else getattr(self.image_processor, name, None)

        side = max(image.size)
        left, top = (side - image.width) // 2, (side - image.height) // 2
        mean = option("image_mean")
        colour = tuple(int(channel * 255) for channel in np.broadcast_to(0.0 if mean is None else mean, 3))
        size, resample = _square_target(option("size")), option("resample")
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

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers. Where that leaves expanded images out of the assistant mask, the mask is made here."""
        wanted = all(kwargs.get(name) for name in ("return_assistant_tokens_mask", "tokenize", "return_dict"))
        if not wanted or hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"):
            return super().apply_chat_template(conversation, chat_template, *args, **kwargs)
        options = {**kwargs, **(kwargs.pop("processor_kwargs", None) or {}), "processor_kwargs": None}
        options.update(return_offsets_mapping=True, return_assistant_tokens_mask=False, return_tensors=None)
        inputs = super().apply_chat_template(conversation, chat_template, *args, **options)
        if isinstance(self.chat_template, dict):
            chat_template = self.chat_template.get(chat_template or "default", chat_template)
        batch = conversation if isinstance(conversation[0], (list, tuple)) else [conversation]
        variables = {**self.tokenizer.special_tokens_map, **kwargs, "conversations": batch}
        prompts, spans = render_jinja_template(**variables, chat_template=chat_template or self.chat_template)
        budgets = iter(inputs.get("num_visual_tokens", repeat(self.image_seq_length)))
        inputs["assistant_masks"] = []
        for prompt, row, offsets in zip(prompts, spans, inputs.pop("offset_mapping"), strict=True):
            # Every placeholder that ends before a character of the prompt has moved it by what the placeholder grew.
            ends = [match.end() for match in re.finditer(re.escape(self.image_token), prompt)]
            grown = [(end, (next(budgets) - 1) * len(self.image_token)) for end in ends]
            row = [[place + sum(growth for end, growth in grown if end <= place) for place in span] for span in row]
            mask = [int(any(left < stop and right > start for start, stop in row)) for left, right in offsets]
            inputs["assistant_masks"].append(mask)
        return inputs.convert_to_tensors(kwargs.get("return_tensors"))


def _call_option(kwargs: dict[str, Any], group: str, name: str) -> Any:
    """An argument of a call, given flat or in its group."""
    return kwargs[name] if name in kwargs else (kwargs.get(group) or {}).get(name)


def _square_target(size: Any) -> tuple[int, int] | None:
    """(width, height) that an image processor's `size` gives a square picture; None where that takes more thought."""
    size = dict(size) if hasattr(size, "__iter__") else {}
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"], size["shortest_edge"]
    return (size["width"], size["height"]) if set(size) == {"width", "height"} else None


def _is_nested(images: Any) -> bool:
    """Whether images come as one list per text; None stands for an empty one."""
    return isinstance(images, (list, tuple)) and any(row is None or isinstance(row, (list, tuple)) for row in images)


def _flatten(images: Any) -> list[Any]:
    """All images of an image, a batch array, a list, or a list of lists; None is no image."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flatten(entry)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [] if images is None else [images]


def _to_rgb(image: Any, index: int, layout: Any = None, rescaled: bool = False) -> Image.Image:
    """Image number `index` of a call as an upright 8-bit RGB picture, or a ValueError that names it."""
    try:
        if isinstance(image, (str, os.PathLike)):
            # A file is opened here, as `load_image` (which fetches URLs and base64) clips 16-bit pictures.
            image = Image.open(image) if os.path.isfile(image) else load_image(image)
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
