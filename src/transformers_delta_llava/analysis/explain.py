"""Which parts of an image an answer is attributed to: gradient times activation before or after the projector."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.prompts import max_prompt_tokens
from .inference import answer_ids, count_visual_tokens, encode_question, find_token, token_text


POSITIONS = ("visual_tokens", "patches")


@dataclass(frozen=True)
class Explanation:
    """
    The saliency of an image's parts for one token of the answer.

    `saliency` is (grid, grid), float32 on the CPU, from 0 to 1, over the square that the vision tower sees, row by row from
    its upper left corner; all zeros where no part raises the token's logit. `grid` is the root of `num_visual_tokens`, or
    `config.grid_size` for patches. The largest value is 1, so the saliency of different answers does not compare.
    `answer` is the whole answer, `token` the text of the token.
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
    arXiv:2011.08891; Grad-CAM, arXiv:1610.02391, averages the gradients over the positions first). The gradient is that
    of the token's logit, with the answer before it as it was given, after the prompt. The activations are, `on`:

    - `"visual_tokens"`: what the projector gives to the language model. With 1 visual token that is a single cell.
    - `"patches"`: all that the projector reads of the vision tower, the hidden states `vision_feature_layer` and
      `vision_feature_levels` side by side, so the saliency of a patch is the sum over these states.

    The model is left as it was: no gradient is stored, and the mode of its modules is kept.

    Args:
        model: on any device, in any dtype, frozen or not.
        processor: its own.
        image: any image.
        prompt: what to ask.
        num_visual_tokens: a budget, or `"auto"`; the processor's default when `None`.
        token: position in the answer, from 0, or a text: the first token where it starts; a word may have several tokens.
        on: `"visual_tokens"` or `"patches"`.
        max_new_tokens: length of the longest answer.

    Raises:
        ValueError: an empty prompt, an empty answer, a token that the answer does not have, another `on`, a length below
            1, a budget that the processor does not have, an image that cannot be used, a prompt longer than the model's
            positions, or gradients that are not finite in the model's dtype.
    """
    check_question(prompt, on, max_new_tokens)
    with _evaluating(model), torch.inference_mode(False):
        limit = max_prompt_tokens(model.config)
        inputs = encode_question(processor, image, prompt, num_visual_tokens, max_tokens=limit)
        inputs = inputs.to(model.device, model.dtype)
        ids = answer_ids(model, inputs, max_new_tokens)
        budget = count_visual_tokens(processor, inputs)
        index = find_token(processor, ids, token, budget)
        saliency = saliency_map(*token_gradients(model, inputs, ids[: index + 1], on))
    return Explanation(
        saliency=saliency,
        answer=processor.decode(ids, skip_special_tokens=True).strip(),
        token=token_text(processor, ids[index : index + 1]),
        num_visual_tokens=budget,
    )


def explain_budgets(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    image: Image.Image,
    prompt: str,
    budgets: Sequence[int | str] = (),
    token: int | str = 0,
    on: str = "visual_tokens",
    max_new_tokens: int = 64,
    on_run: Callable[[], None] | None = None,
) -> list[Explanation]:
    """
    `explain` at every one of `budgets`, by default `default_budgets`; `on_run` is called after each.

    Raises:
        ValueError: see `explain`; a budget that the processor does not have is refused before the first run.
    """
    processor.resolve_num_visual_tokens(budgets)
    explanations = []
    for budget in budgets or default_budgets(processor):
        explanations.append(explain(model, processor, image, prompt, budget, token, on, max_new_tokens))
        if on_run is not None:
            on_run()
    return explanations


def check_question(prompt: str, on: str, max_new_tokens: int) -> None:
    """
    Refuse what can be known to be wrong before a model is loaded.

    Raises:
        ValueError: see `explain`.
    """
    if on not in POSITIONS:
        raise ValueError(f"on={on!r}: use {' or '.join(map(repr, POSITIONS))}.")
    if not prompt.strip():
        raise ValueError("The prompt is empty: ask something about the image.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: use at least 1.")


def default_budgets(processor: DeltaLlavaProcessor) -> list[int]:
    """The model's own number of visual tokens and the next two below it, as far as the processor has them."""
    own = processor.image_seq_length
    budgets = sorted(processor.visual_token_budgets, reverse=True)
    return [budget for budget in budgets if budget <= own][:3] or budgets[-1:]


def token_gradients(
    model: DeltaLlavaForConditionalGeneration, inputs: Any, answer: Sequence[int], on: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Activations, (positions, channels), and the gradient there of the logit of the last token of `answer`.

    One pass forward and back, from the activations on; what comes before them is run without gradients. The features of
    the image are passed in instead of being hooked, so that nothing in the model changes, not even for the moment.
    """
    base, config = model.model, model.config
    *before, target = answer
    budget = int((inputs["input_ids"] == config.image_token_id).sum())
    with torch.no_grad():
        if on == "visual_tokens":
            (activations,) = model.get_image_features(inputs["pixel_values"], budget, return_dict=True).pooler_output
        else:
            _, features, levels = base.get_patch_features(inputs["pixel_values"])
            activations = torch.cat([features, *levels], dim=-1)[0]
    with torch.enable_grad():
        activations = activations.detach().requires_grad_()
        visual_tokens = activations
        if on == "patches":
            features, *levels = activations[None].chunk(1 + len(levels), dim=-1)
            (visual_tokens,) = base.project_features(features, levels, [budget])
        input_ids = torch.cat([inputs["input_ids"], inputs["input_ids"].new_tensor([before])], dim=1)
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=[visual_tokens])}
        outputs = model(input_ids=input_ids, mm_encoder_outputs=encoded, logits_to_keep=1, use_cache=False)
        # `grad` stores nothing in the parameters, whether they want gradients or not.
        (gradients,) = torch.autograd.grad(outputs.logits[0, -1, target], activations)
    return activations.detach(), gradients


def saliency_map(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """
    (g, g) float32 on the CPU, 0 to 1, from activations and gradients (g * g, channels): positive parts of the products.

    Raises:
        ValueError: the products are not finite.
    """
    saliency = (activations.cpu().double() * gradients.cpu().double()).sum(-1).clamp(min=0)
    if not saliency.isfinite().all():
        raise ValueError(f"The gradients are not finite in {gradients.dtype}: use bfloat16 or float32.")
    if saliency.any():
        saliency = saliency / saliency.max()
    return saliency.unflatten(0, (isqrt(len(saliency)), -1)).float()


@contextmanager
def _evaluating(model: DeltaLlavaForConditionalGeneration) -> Iterator[None]:
    """All modules in evaluation mode, and afterwards each in its own again."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
