"""An export beside its model: the same image and questions, the same logits and tokens?"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..analysis.inference import answer_ids, encode_question
from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.errors import DeltaLlavaError
from .run_onnx import OnnxModel


QUESTION = "What is in this image?"
MAX_NEW_TOKENS = 16
# What float32 may differ by, as a part of the largest logit: sums in another order, layer by layer.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One answer, compared.

    Attributes:
        dtype: precision of the graphs; the model is in float32.
        num_visual_tokens: 0 for a question without an image.
        max_difference: of the logits, as a part of the largest one.
        num_tokens: of the answer, its end included.
        equal_tokens: how many of them the graphs give too, each after the same beginning.
    """

    dtype: str
    num_visual_tokens: int
    max_difference: float
    num_tokens: int
    equal_tokens: int


def verify_export(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    folder: Path,
    dtypes: Iterable[str],
    numbers: Sequence[int],
) -> list[Comparison]:
    """Compare the logits of a short answer, position by position, for each precision and each number of visual tokens.

    Args:
        model, processor: what was exported, in float32.
        folder: the export.
        dtypes: precisions.
        numbers: of visual tokens.

    Raises:
        DeltaLlavaError: graphs in float32 answer otherwise, or logits are not finite.
    """
    image = draw_image()
    references = {number: _reference(model, processor, image, number) for number in (*numbers, 0)}
    comparisons = []
    for dtype in dtypes:
        graphs = OnnxModel(folder, dtype)
        for number, (ids, answer, expected) in references.items():
            if number and not np.array_equal(ids, graphs.encode(QUESTION, number)):
                raise DeltaLlavaError("The exported tokenizer writes another prompt than the repo's processor.")
            visual = graphs.encode_image(image, number) if number else None
            logits, cache = graphs.forward(ids, visual)
            rows = [logits]
            for token in answer:
                logits, cache = graphs.forward(np.array([[token]]), None, cache)
                rows.append(logits)
            comparisons.append(_compare(dtype, number, np.stack(rows), expected))
    return comparisons


def draw_image() -> Image.Image:
    """A red disc on a ground from blue to green, not square, so that padding matters."""
    row = np.linspace(0, 255, 96, dtype=np.uint8)
    ground = np.stack([np.zeros_like(row), row, row[::-1]], axis=-1)
    image = Image.fromarray(np.tile(ground, (64, 1, 1)))
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill=(220, 30, 30))
    return image


@torch.no_grad()
def _reference(
    model: DeltaLlavaForConditionalGeneration, processor: DeltaLlavaProcessor, image: Image.Image, number: int
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Ids of the prompt (1, sequence), the answer, and the logits (answer + 1, vocabulary) that lead to it and its end."""
    inputs = encode_question(processor, image if number else None, QUESTION, number or None)
    answer = answer_ids(model, inputs, MAX_NEW_TOKENS)
    ids = inputs["input_ids"]
    images: dict[str, Any] = {key: inputs[key] for key in ("pixel_values", "num_visual_tokens") if key in inputs}
    whole = torch.cat([ids, torch.tensor([answer], dtype=ids.dtype)], dim=1)
    logits = model(input_ids=whole, **images, logits_to_keep=len(answer) + 1).logits[0]
    return ids.numpy(), answer, logits.float().numpy()


def _compare(dtype: str, number: int, logits: np.ndarray, expected: np.ndarray) -> Comparison:
    difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
    equal = int((logits.argmax(-1) == expected.argmax(-1)).sum())
    where = f"with {number} visual tokens" if number else "without an image"
    if not np.isfinite(logits).all():
        raise DeltaLlavaError(
            f"The graphs in {dtype} give logits {where} that are NaN or infinite; use another dtype."
        )
    if dtype == "fp32" and (difference > TOLERANCE or equal < len(logits)):
        raise DeltaLlavaError(
            f"The graphs in fp32 do not give what the model does {where}: logits differ by {difference:.1e} of the largest, "
            f"and {equal} of {len(logits)} tokens are the same."
        )
    return Comparison(dtype, number, difference, len(logits), equal)
