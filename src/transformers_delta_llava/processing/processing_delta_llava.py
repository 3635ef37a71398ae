# Copyright 2026 The transformers-delta-llava authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the License.
# You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS"
# BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Processor of Delta-LLaVA: images and videos become pixel values, and each `<image>` or `<video>` its placeholders.

The numbers of visual tokens are data, saved with the processor; the model's configuration counts them.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice, repeat
from math import ceil, isqrt, prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, __version__
from transformers.image_processing_utils import select_best_resolution
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, VideosKwargs
from transformers.video_utils import VideoMetadata, load_video

from .auto_budget_delta_llava import detail_kept, pick_budget


# From 5.23 on, transformers shifts assistant masks when placeholders are expanded.
MASKS_EXPANDED_PLACEHOLDERS = tuple(int(number) for number in __version__.split(".")[:2]) >= (5, 23)
# A longer image is refused: the square around it would take gigabytes, nearly all of it padding.
MAX_SIDE = 2**14
VIDEO_TOKEN = "<video>"
# Frames of a video when a call does not say, and the most that a call may ask for.
NUM_FRAMES, MAX_FRAMES = 8, 1024


class DeltaLlavaImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call that concern images."""

    num_visual_tokens: Any
    auto_min_detail: float | int | None
    do_pad: bool | None
    max_tiles: Any
    numbers_per_image: bool | None


class DeltaLlavaVideosKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call that concern videos."""

    num_visual_tokens: Any
    do_pad: bool | None


class DeltaLlavaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call."""

    _defaults = {}  # type: ignore[var-annotated]  # older transformers read it; a TypedDict does not inherit it
    images_kwargs: DeltaLlavaImagesKwargs
    videos_kwargs: DeltaLlavaVideosKwargs


class DeltaLlavaProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of a Delta-LLaVA model in one.

    A call takes, in addition to the usual arguments, `num_visual_tokens` (an integer, `"auto"`, `"low"`, `"high"`, or one of these
    per image in the order of the placeholders: list, tuple, array or tensor), `auto_min_detail` and `do_pad`. It returns
    `input_ids`, `attention_mask`, `pixel_values` of shape (images, 3, height, width), float32, all images of the batch in
    order, and `num_visual_tokens` of shape (images,), int64, only when the number of some image is picked or not the
    model's default.

    `"auto"` picks for every image the smallest number that keeps `auto_min_detail` of its detail, see `image_detail`;
    `"low"` is the smallest number of at least 4, `"high"` the largest, as the `detail` of images in OpenAI's API.

    Images are what `transformers.image_utils.load_image` takes, arrays and tensors. Each is rotated by its EXIF tag and
    converted to 8-bit RGB; transparency is dropped, as in the authors' code. Text is padded by the tokenizer: generation
    needs `padding_side="left"`.

    With `max_tiles` above 1 (in a call one number, or one per image) an image larger than the tower's input is seen in
    several views: the whole image, then the tiles of the grid that fits it best, row by row. `num_visual_tokens` is per
    view, `pixel_values` has a row per view, and `image_grid_thw` of shape (images, 3), int64, whose product is the number
    of views, is returned as well.

    Videos (`videos`: paths, URLs, lists of frames, arrays of shape (frames, height, width, 3)) are seen as frames, each
    padded like an image. A call takes `num_frames` (8 unless given) or `fps`, `do_sample_frames` (for decoded frames only
    when it is given), and `num_visual_tokens` per frame, a number or a word as above (`"low"` unless given; `"auto"` means
    the same). It returns `pixel_values_videos` (frames, 3, height, width), `num_visual_tokens_videos` (frames,) and
    `video_grid_thw` (videos, 3). Files are decoded by `av`.

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
        max_tiles (`int`, *optional*, defaults to 1): The most tiles of an image; a list as `num_visual_tokens` takes one.
        max_tiles_limit (`int`, *optional*, defaults to 16): The most that a call may ask for.
        use_thumbnail (`bool`, *optional*, defaults to `True`): Show the whole image before its tiles.
        image_grid_pinpoints (`list[list[int]]`, *optional*): (height, width) of the possible grids, of at most `max_tiles`
            tiles. By default all of them.

    Raises:
        ValueError: For a number that the model does not have, images that do not fit the text, an unreadable image.
    """

    valid_processor_kwargs = DeltaLlavaProcessorKwargs
    # What engines ask a video processor for. One of transformers' own, saved with a repo, would need torchvision to load.
    video_processor = SimpleNamespace(
        model_input_names=["pixel_values_videos", "num_visual_tokens_videos", "video_grid_thw"],
        num_frames=NUM_FRAMES,
        fps=None,
        do_sample_frames=False,
    )

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
        max_tiles: int | list[int] = 1,
        max_tiles_limit: int = 16,
        use_thumbnail: bool = True,
        image_grid_pinpoints: list[list[int]] | None = None,
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
        self.max_tiles, self.max_tiles_limit, self.use_thumbnail = max_tiles, max_tiles_limit, use_thumbnail
        self.image_grid_pinpoints = image_grid_pinpoints
        self._tiles_per_image(max_tiles, len(max_tiles) if isinstance(max_tiles, (list, tuple)) else 1)
        known = tokenizer.encode(VIDEO_TOKEN, add_special_tokens=False)
        self.video_token: str | None = VIDEO_TOKEN if len(known) == 1 else None
        self.video_token_id: int | None = known[0] if len(known) == 1 else None
        # vLLM passes on what the processor of a modality names.
        self.image_processor.model_input_names = ["pixel_values", "num_visual_tokens"]
        # from_pretrained hands its overrides to the tokenizer too, which would keep them as defaults of every call.
        for name in ("num_visual_tokens", "visual_token_budgets", "auto_min_detail", "do_pad", "max_tiles"):
            tokenizer.init_kwargs.pop(name, None)

    @property
    def model_input_names(self) -> list[str]:
        """Names of a call's possible outputs, text first (the Trainer measures lengths by the first)."""
        parts = (self.tokenizer, self.image_processor, self.video_processor)
        return [*(name for part in parts for name in part.model_input_names), "image_grid_thw"]

    @property
    def image_side(self) -> int:
        """Pixels along a side of what the tower sees."""
        return max(dict(getattr(self.image_processor, "crop_size", None) or self.image_processor.size).values())

    # Tools that count placeholders themselves divide the image by these.
    num_additional_image_tokens = 0
    vision_feature_select_strategy = "full"

    @property
    def patch_size(self) -> int:
        """Pixels along a side of what one visual token stands for, when no number is given."""
        return self.image_side // isqrt(self.image_seq_length)

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, Any, Any]:
        """As in the base class. Images become a flat list of upright 8-bit RGB images, and BOS is not added twice."""
        flat = [_to_rgb(image) for image in _flatten(images)]
        text = list(text) if isinstance(text, tuple) else text
        images, text, _, audio = super().prepare_inputs_layout(images=flat or None, text=text, **kwargs)
        add_special_tokens = {**(kwargs.get("text_kwargs") or {}), **kwargs}.get("add_special_tokens", True)
        bos = self.tokenizer.bos_token
        if text and bos and add_special_tokens and self.tokenizer.encode("")[:1] == [self.tokenizer.bos_token_id]:
            text = [sample.removeprefix(bos) for sample in text]
        return images, text, _flatten_videos(videos) or None, audio

    def validate_inputs(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> None:
        """As in the base class, which does not count images in all releases."""
        super().validate_inputs(images=images, text=text, videos=videos, **kwargs)
        for token, given, kind in ((self.image_token, images, "images"), (self.video_token, videos, "videos")):
            placeholders = sum(sample.count(token) for sample in text or [] if token)
            if text is not None and placeholders != len(given or []):
                raise ValueError(f"the texts have {placeholders} {token}, and {len(given or [])} {kind} were passed")

    def _process_images(
        self,
        images: Any,
        num_visual_tokens: Any = None,
        auto_min_detail: float | None = None,
        do_pad: bool | None = None,
        max_tiles: Any = None,
        numbers_per_image: bool | None = False,
        **kwargs: Any,
    ) -> tuple[BatchFeature, list[str]]:
        for name, default in (("num_visual_tokens", self.num_visual_tokens), ("max_tiles", self.max_tiles)):
            if isinstance(default, (list, tuple)) and len(set(default)) > 1 and not numbers_per_image:
                # vLLM loads the processor with the arguments of a request. Its cache finds images by their content and
                # these arguments, not by their place in the list, so the same images in another order would get wrong
                # numbers.
                raise ValueError(
                    f"{name}={list(default)}: different numbers in one request need an engine without a cache of "
                    "processed images, that is started with numbers_per_image=True"
                )
        choices = self.resolve_num_visual_tokens(num_visual_tokens, len(images))
        tiles = self._tiles_per_image(max_tiles, len(images))
        min_detail = self.auto_min_detail if auto_min_detail is None else auto_min_detail
        numbers = [
            pick_budget(detail_kept(image, self.visual_token_budgets), min_detail) if choice == "auto" else choice
            for image, choice in zip(images, choices)
        ]
        views = [
            self._views(image, self._grid(image.size, most), do_pad, **kwargs) for image, most in zip(images, tiles)
        ]
        inputs = self.image_processor([view for own in views for view in own], **kwargs)
        if any(most > 1 for most in tiles):
            inputs["image_grid_thw"] = [[len(own), 1, 1] for own in views]
        if "auto" in choices or any(number != self.image_seq_length for number in numbers):
            # Only then: without it the model counts by its configuration and compiles without a graph break. What "auto"
            # picks is always returned, else the inputs of two calls could not be batched.
            inputs["num_visual_tokens"] = [number for number, own in zip(numbers, views) for _ in own]
        counts = islice(self._placeholders(inputs), len(images))
        inputs = BatchFeature(inputs, tensor_type=kwargs.get("return_tensors"))
        return inputs, [self.image_token * count for count in counts]

    def _process_videos(
        self,
        videos: Any,
        num_visual_tokens: Any = None,
        do_pad: bool | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool | None = None,
        video_metadata: Any = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> tuple[BatchFeature, list[str]]:
        low = self._resolve("low")
        choices = self.resolve_num_visual_tokens(num_visual_tokens or "low", len(videos))
        numbers: Any = [low if choice == "auto" else choice for choice in choices]
        sample = partial(_sample_frames, num_frames=num_frames, fps=fps)
        clips = []
        for index, video in enumerate(videos):
            if isinstance(video, str):
                video, _ = load_video(video, sample_indices_fn=sample)
            elif do_sample_frames:
                given = video_metadata[index] if video_metadata else {"total_num_frames": len(video)}
                video = [video[i] for i in sample(VideoMetadata(**given) if isinstance(given, dict) else given)]
            clips.append([self._views(_to_rgb(frame), (1, 1), do_pad)[0] for frame in video])
        pixels = self.image_processor([frame for clip in clips for frame in clip], return_tensors=return_tensors)
        inputs = {
            "pixel_values_videos": pixels["pixel_values"],
            "num_visual_tokens_videos": [number for number, clip in zip(numbers, clips) for _ in clip],
            "video_grid_thw": [[len(clip), 1, 1] for clip in clips],
        }
        replacements = [str(self.video_token) * (number * len(clip)) for number, clip in zip(numbers, clips)]
        return BatchFeature(inputs, tensor_type=return_tensors), replacements

    def _tiles_per_image(self, max_tiles: Any, num_images: int) -> list[int]:
        given = self.max_tiles if max_tiles is None else max_tiles
        tiles = list(given) if isinstance(given, (list, tuple)) else [given] * num_images
        if len(tiles) != num_images or not all(1 <= most <= self.max_tiles_limit for most in tiles):
            raise ValueError(
                f"max_tiles={given!r}: choose from 1 to {self.max_tiles_limit}, for all or for each image"
            )
        return tiles

    def _grid(self, size: tuple[int, int], max_tiles: int) -> tuple[int, int]:
        """Rows and columns of the tiles of an image of this (width, height)."""
        if max_tiles == 1:
            return 1, 1
        side, rows = self.image_side, range(1, max_tiles + 1)
        grids = [(row * side, column * side) for row in rows for column in rows]
        grids = [(height, width) for height, width in self.image_grid_pinpoints or grids]
        grids = [grid for grid in grids if prod(grid) <= max_tiles * side**2] or [(side, side)]
        height, width = select_best_resolution((size[1], size[0]), grids)
        return height // side, width // side

    def _views(
        self, image: Image.Image, grid: tuple[int, int], do_pad: bool | None, image_mean: Any = None, **kwargs: Any
    ) -> list[Image.Image]:
        """
        The image as the tower sees it: as a whole, and in tiles.

        Source: "pad" and, without padding, "anyres" of the authors' code, which squashes the whole image into a square, and
        fits it into black tiles.
        """
        pad = self.do_pad if do_pad is None else do_pad
        mean = image_mean or getattr(self.image_processor, "image_mean", None) or 0.0
        colour = tuple(int(channel * 255) for channel in np.broadcast_to(mean, 3)) if pad else (0, 0, 0)
        if grid == (1, 1):
            return [_to_square(image, colour) if pad else image]
        side, (rows, columns) = self.image_side, grid
        width, height = columns * side, rows * side
        scale = min(width / image.width, height / image.height)
        fitted = min(ceil(image.width * scale), width), min(ceil(image.height * scale), height)
        canvas = Image.new("RGB", (width, height), colour)
        canvas.paste(image.resize(fitted), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
        corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
        tiles = [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
        whole = _to_square(image, colour) if pad else image.resize((side, side))
        return [whole, *tiles] if self.use_thumbnail else tiles

    def _placeholders(self, image_inputs: Any) -> Iterator[int]:
        """Placeholders of each image among processed inputs; of endlessly many, where all have the processor's number."""
        numbers, grids = image_inputs.get("num_visual_tokens"), image_inputs.get("image_grid_thw")
        views = repeat(self.image_seq_length) if numbers is None else map(int, numbers)
        return views if grids is None else (sum(islice(views, prod(map(int, grid)))) for grid in grids)

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """
        Placeholders and rows of pixel values for images of these (height, width) and videos of these (frames, height,
        width); engines plan with them.

        For `"auto"` the largest possible number, as a size does not say what it will pick.
        """
        data = MultiModalData()
        given = {**kwargs, **(kwargs.get("images_kwargs") or {})}
        if image_sizes is not None:
            choices = self.resolve_num_visual_tokens(given.get("num_visual_tokens"), len(image_sizes))
            tiles = self._tiles_per_image(given.get("max_tiles"), len(image_sizes))
            grids = [self._grid((width, height), most) for (height, width), most in zip(image_sizes, tiles)]
            views = [prod(grid) + (grid != (1, 1) and self.use_thumbnail) for grid in grids]
            most = [max(self.visual_token_budgets) if choice == "auto" else choice for choice in choices]
            data.num_image_tokens = [number * count for number, count in zip(most, views)]
            data.num_image_patches = views
        if video_sizes is not None and self.video_token is not None:
            given = {**kwargs, **(kwargs.get("videos_kwargs") or {})}
            choices = self.resolve_num_visual_tokens(given.get("num_visual_tokens") or "low", len(video_sizes))
            per_frame: Any = [self._resolve("low") if choice == "auto" else choice for choice in choices]
            data.num_video_tokens = [number * size[0] for number, size in zip(per_frame, video_sizes)]
        return data

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
        numbers = self._placeholders(inputs)
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


def _to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """`image` in the middle of a square of `colour`; the offset is rounded down."""
    side = max(image.size)
    if side > MAX_SIDE:
        raise ValueError(
            f"an image of {image.width} x {image.height} is too long to pad; resize it to {MAX_SIDE} pixels"
        )
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _flatten_videos(videos: Any) -> list[Any]:
    """All videos (paths, URLs, lists of frames, arrays) of one video, a list, or a list of lists."""
    if videos is None:
        return []
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        return list(videos)
    if isinstance(videos, (list, tuple)) and not (videos and _is_frame(videos[0])):
        return [video for entry in videos for video in _flatten_videos(entry)]
    return [videos]


def _is_frame(value: Any) -> bool:
    return isinstance(value, Image.Image) or isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 3


def _sample_frames(
    metadata: Any, num_frames: int | None = None, fps: float | None = None, **kwargs: Any
) -> np.ndarray:
    """Indices of evenly spaced frames, all of them where there are fewer."""
    total = metadata.total_num_frames
    if not total:
        raise ValueError("the video does not say how many frames it has; pass its frames")
    if fps is not None:
        if num_frames is not None or not metadata.fps:
            raise ValueError("fps needs a video that has a frame rate, and no num_frames")
        num_frames = max(1, int(total / metadata.fps * fps))
    wanted = NUM_FRAMES if num_frames is None else num_frames
    if not 1 <= wanted <= MAX_FRAMES:
        raise ValueError(f"num_frames={wanted}: choose from 1 to {MAX_FRAMES}")
    count = min(wanted, total)
    return np.arange(count) * total // count
