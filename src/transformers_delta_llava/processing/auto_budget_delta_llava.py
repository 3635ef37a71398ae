"""The rule behind `num_visual_tokens="auto"`: how many visual tokens an image needs, from its pixels alone."""

from collections.abc import Sequence
from math import isqrt

import numpy as np


# Windows whose colours differ by less than this many of 255 levels (root mean square) count as one colour: a blank wall
# stays blank under the noise of a camera.
NOISE_LEVEL = 2.0


def budget_losses(
    levels: np.ndarray, budgets: Sequence[int], content: tuple[int, int, int, int] | None = None
) -> dict[int, float]:
    """
    The share of an image that each number of visual tokens loses: 0 is nothing, 1 is all.

    A budget of g x g visual tokens divides the image into g x g equal windows, one per token. `V(budget)` is the variance
    of the windows' mean colours, weighted by their pixels. It only falls when windows grow, and is 0 for a single one.
    Compared with the largest budget,

        loss(budget) = (V(largest) - V(budget)) / (V(largest) + NOISE_LEVEL^2), and 0 where that is negative.

    So the largest budget loses nothing, a blank image almost nothing at any, and brightness and contrast hardly count.
    Sums are over integers: equal pixels give equal losses on every machine.

    Args:
        levels: the image as the model sees it, (channels, height, width), integers on the scale 0..255.
        budgets: square numbers.
        content: (top, bottom, left, right), the part that counts; the rest is padding. The whole image when `None`.

    Returns:
        The loss of each budget, in the order of `budgets`.
    """
    top, bottom, left, right = content or (0, levels.shape[1], 0, levels.shape[2])
    inside = levels[:, top:bottom, left:right].astype(np.int64)
    sums = np.zeros((len(inside), bottom - top + 1, right - left + 1), np.int64)  # of all pixels above and to the left
    sums[:, 1:, 1:] = inside.cumsum(1).cumsum(2)

    def variance(budget: int) -> float:
        rows = _edges(levels.shape[1], isqrt(budget), top, bottom)
        columns = _edges(levels.shape[2], isqrt(budget), left, right)
        totals = np.diff(np.diff(sums[:, rows][:, :, columns], axis=1), axis=2)
        pixels = np.diff(rows)[:, None] * np.diff(columns)
        means = sums[:, -1, -1] / (inside[0].size)
        return float((pixels * (totals / pixels - means[:, None, None]) ** 2).sum() / inside.size)

    largest = variance(max(budgets))
    return {budget: max(0.0, (largest - variance(budget)) / (largest + NOISE_LEVEL**2)) for budget in budgets}


def pick_budget(losses: dict[int, float], max_loss: float) -> int:
    """The smallest budget that loses at most `max_loss`, from the result of [`budget_losses`]."""
    return min(budget for budget, loss in losses.items() if round(loss, 9) <= max_loss)


def _edges(length: int, windows: int, start: int, stop: int) -> np.ndarray:
    """Edges of equal windows over `length` pixels, clipped to start..stop and counted from start, without empty windows."""
    return np.unique(np.clip(np.rint(np.linspace(0, length, windows + 1)).astype(np.int64), start, stop)) - start
