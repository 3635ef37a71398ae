"""Right answers counted, with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


Z_95 = 1.959963984540054  # the normal distribution holds 95 % within this many standard deviations


@dataclass(frozen=True)
class Score:
    """`correct` of `total` questions, in percent, with a 95 % Wilson interval."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Percent answered right; not a number where nothing was asked."""
        return 100 * self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The two ends of the interval, in percent."""
        low, high = wilson_interval(self.correct, self.total)
        return 100 * low, 100 * high

    def to_dict(self) -> dict[str, float | int | list[float]]:
        """What a JSON report holds, percentages with two digits behind the point."""
        return {
            "correct": self.correct,
            "total": self.total,
            "accuracy": round(self.accuracy, 2),
            "interval_95": [round(end, 2) for end in self.interval],
        }


def wilson_interval(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """
    The score interval of Wilson (1927) for the share of right answers; (0, 1) where nothing was asked.

    It takes the questions for independent. Questions on one image are not quite, so the true interval is wider.

    Raises:
        ValueError: more right answers than questions, or fewer than none.
    """
    if not 0 <= correct <= total:
        raise ValueError(f"correct={correct}: it must be from 0 to total, {total}.")
    if total == 0:
        return 0.0, 1.0
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def score_answers(truths: Sequence[str], answers: Sequence[str]) -> dict[str, Score]:
    """
    `overall`, `yes/no` (the truth is yes or no) and `open` (it is anything else), by exact match.

    Raises:
        ValueError: not as many answers as questions.
    """
    if len(truths) != len(answers):
        raise ValueError(f"There are {len(answers)} answers to {len(truths)} questions.")
    closed = [truth in ("yes", "no") for truth in truths]
    right = [truth == answer for truth, answer in zip(truths, answers)]
    return {
        "overall": Score(sum(right), len(right)),
        "yes/no": Score(sum(r for r, c in zip(right, closed) if c), sum(closed)),
        "open": Score(sum(r for r, c in zip(right, closed) if not c), len(closed) - sum(closed)),
    }
