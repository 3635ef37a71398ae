"""Which parts of an image an answer depends on: gradient times activation, before or after the projector."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .errors import DeltaLlavaError
from .loading import answer_ids, encode_question
from .modeling import DeltaLlavaForConditionalGeneration
from .processing import DeltaLlavaProcessor


PANEL = 336  # pixels: the smallest side of a saliency map


@dataclass(frozen=True)
class Explanation:
    """
    The saliency of an image's parts for one token of the answer.

    Attributes:
        saliency: (grid, grid), float32 on the CPU, from 0 to 1, over the square that the vision tower sees; all zeros where
            no part raises the token's logit. `grid` is the root of `num_visual_tokens`, or `config.grid_size` for patches.
        answer: the whole answer.
        token: text of the explained token.
        num_visual_tokens: of the image.
    """

    saliency: torch.Tensor
    answer: str
    token: str
    num_visual_tokens: int


def explain(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    image: Image.Image,
    prompt: str,
    num_visual_tokens: int | str | None = None,
    token: int | str = 0,
    on: str = "visual_tokens",
    max_new_tokens: int = 64,
) -> Explanation:
    """
    Answer `prompt` about `image` greedily, and attribute one token of the answer to parts of the image.

    The saliency of a position is the sum over its channels of activation times gradient, negative sums set to 0 (HiResCAM,
    arXiv:2011.08891). The gradient is that of the token's logit, given the prompt and the answer before it.

    Args:
        model: on any device, in any dtype, frozen or not. No gradient is stored in it.
        processor: of the same repo.
        image: any image.
        prompt: question about it.
        num_visual_tokens: a number or `"auto"`; the processor's default when `None`.
        token: position in the answer, or a word of it, whose first token is explained.
        on: `"visual_tokens"`, the projector's output, or `"patches"`, all that the projector reads of the vision tower (the
            only choice that shows something with 1 visual token).
        max_new_tokens: length of the longest answer.

    Raises:
        ValueError: the answer is empty or does not have the token, or the gradients are not finite.
    """
    with _evaluating(model), torch.inference_mode(False):
        # Tiles would need a map each.
        inputs = encode_question(processor, image, prompt, num_visual_tokens=num_visual_tokens, max_tiles=1)
        inputs = inputs.to(model.device, model.dtype)
        ids = answer_ids(model, inputs, max_new_tokens)
        index = find_token(processor, ids, token)
        saliency = saliency_map(*token_gradients(model, inputs, ids[: index + 1], on))
    return Explanation(
        saliency=saliency,
        answer=processor.decode(ids, skip_special_tokens=True).strip(),
        token=processor.decode(ids[index : index + 1]).strip(),
        num_visual_tokens=int((inputs["input_ids"] == processor.image_token_id).sum()),
    )


def find_token(processor: DeltaLlavaProcessor, ids: Sequence[int], token: int | str) -> int:
    """Position of `token` in an answer: the number itself, or the first token of a word's first occurrence."""
    answer = processor.decode(ids)
    if isinstance(token, int) and 0 <= token < len(ids):
        return token
    if isinstance(token, str) and token in answer:
        start = answer.index(token)
        return next(index for index in range(len(ids)) if len(processor.decode(ids[: index + 1])) > start)
    raise ValueError(f"token={token!r} is not in the answer, which has {len(ids)} tokens: {answer.strip()!r}")


def token_gradients(
    model: DeltaLlavaForConditionalGeneration, inputs: Any, answer: Sequence[int], on: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Activations (positions, channels), and the gradient there of the logit of the last token of `answer`.

    One forward and one backward pass, from the activations on. The features of the image are passed in instead of being
    hooked, so nothing in the model changes.
    """
    base, (*before, target) = model.model, answer
    budget = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with torch.no_grad():
        if on == "visual_tokens":
            (activations,) = model.get_image_features(inputs["pixel_values"], budget, return_dict=True).pooler_output
        else:
            features = base.get_patch_features(inputs["pixel_values"])
            activations = torch.cat([features.stream, *features.levels], dim=-1)[0]
    with torch.enable_grad():
        activations = activations.detach().requires_grad_()
        visual_tokens = activations
        if on == "patches":
            stream, *levels = activations[None].chunk(1 + len(features.levels), dim=-1)
            (visual_tokens,) = base.project_features(features._replace(stream=stream, levels=levels), budget)
        input_ids = torch.cat([inputs["input_ids"], inputs["input_ids"].new_tensor([before])], dim=1)
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=[visual_tokens])}
        outputs = model(input_ids=input_ids, mm_encoder_outputs=encoded, logits_to_keep=1, use_cache=False)
        (gradients,) = torch.autograd.grad(outputs.logits[0, -1, target], activations)
    return activations.detach(), gradients


def saliency_map(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """(g, g) float32 on the CPU, 0 to 1, from activations and gradients (g * g, channels)."""
    saliency = (activations.cpu().double() * gradients.cpu().double()).sum(-1).clamp(min=0)
    if not saliency.isfinite().all():
        raise ValueError(f"gradients are not finite in {gradients.dtype}; use bfloat16 or float32")
    if saliency.any():
        saliency = saliency / saliency.max()
    return saliency.unflatten(0, (isqrt(len(saliency)), -1)).float()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, and afterwards each in its own again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def overlay_saliency(image: Image.Image, explanation: Explanation, processor: DeltaLlavaProcessor) -> Image.Image:
    """The image as the vision tower sees it, padded or cropped to a square, with the saliency over it."""
    images = processor.image_processor
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    pixels = (pixels * images.image_std + images.image_mean).clip(0, 1)
    view = Image.fromarray(np.rint(255 * pixels).astype(np.uint8))
    view = view.resize([max(PANEL, side) for side in view.size], Image.Resampling.BICUBIC)
    cells = Image.fromarray(explanation.saliency.numpy())
    saliency = np.asarray(cells.resize(view.size, Image.Resampling.BILINEAR)).clip(0, 1)
    colours = 255 * _matplotlib().colormaps["inferno"](saliency)[..., :3]
    opacity = (0.4 + 0.4 * saliency)[..., None]
    return Image.fromarray(np.rint(np.asarray(view) * (1 - opacity) + colours * opacity).astype(np.uint8))


def plot_explanations(
    image: Image.Image, explanations: Sequence[Explanation], processor: DeltaLlavaProcessor, prompt: str, path: Path
) -> None:
    """Write the image and the saliency of every explanation with its answer, side by side, as `path` (PNG or SVG)."""
    figure = _matplotlib().figure.Figure(figsize=(3.5 * (1 + len(explanations)), 4.5), layout="constrained")
    figure.suptitle(_wrap(prompt, 40 * (1 + len(explanations))))
    axes = figure.subplots(1, 1 + len(explanations))
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    axes[0].imshow(image.convert("RGB"))
    for axis, explanation in zip(axes[1:], explanations):
        axis.imshow(overlay_saliency(image, explanation, processor))
        saliency = "saliency" if explanation.saliency.any() else "no saliency"
        label = f"{_wrap(explanation.answer, 44)}\n{saliency} of {_wrap(repr(explanation.token), 44)}"
        axis.set(title=f"{explanation.num_visual_tokens} visual tokens", xlabel=label)
    figure.supxlabel("Every panel has its own scale.", size=8)
    figure.savefig(path, dpi=100)


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width).replace("$", r"\$")  # or matplotlib reads it as mathematics


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise DeltaLlavaError("figures need matplotlib; install the extra `plots`") from error
    return matplotlib
