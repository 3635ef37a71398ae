# Copyright 2026 The transformers-delta-llava authors.
# SPDX-License-Identifier: Apache-2.0
"""The rule behind `num_visual_tokens="auto"`: how many visual tokens an image needs, from its pixels only."""

from collections.abc import Sequence
from math import isqrt

import numpy as np
from PIL import Image


# Windows whose colours differ by less than this many of 255 levels (root mean square) count as one colour: a blank wall
# stays blank under the noise of a camera.
NOISE_LEVEL = 2.0


def detail_kept(image: Image.Image, budgets: Sequence[int]) -> dict[int, float]:
    """
    The share of an image's detail that each number of visual tokens keeps, from 0 to 1; the largest keeps all.

    g x g visual tokens divide the square around the image into g x g windows. With `V(budget)` the variance between the mean
    colours of the windows on the image (RGB averaged, 0..255),

        detail(budget) = 1 - max(0, V(largest) - V(budget)) / (V(largest) + NOISE_LEVEL^2).

    So a blank image keeps nearly all at any budget, and brightness and contrast hardly count.

    Args:
        image: RGB.
        budgets: square numbers.
    """
    side = max(image.size)

    def variance(budget: int) -> float:
        grid = isqrt(budget)
        windows = max(1, round(grid * image.width / side)), max(1, round(grid * image.height / side))
        return float(np.asarray(image.resize(windows, Image.Resampling.BOX), np.float64).var((0, 1)).mean())

    variances = {budget: variance(budget) for budget in budgets}
    largest = variances[max(budgets)]
    return {budget: 1 - max(0.0, largest - value) / (largest + NOISE_LEVEL**2) for budget, value in variances.items()}


def pick_budget(details: dict[int, float], min_detail: float) -> int:
    """The smallest budget that keeps at least `min_detail`, from the result of [`detail_kept`]."""
    enough = (budget for budget, detail in details.items() if detail >= min_detail)
    return min(enough, default=max(details))
