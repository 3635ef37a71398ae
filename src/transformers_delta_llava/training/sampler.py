"""Which rows make up a step, and how many visual tokens its images get.

Both follow from seed and epoch alone, so a run that is resumed goes on as if it had not stopped, and all processes of
a run agree without talking to each other.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


POOL_STEPS = 50  # rows are sorted by length among those of this many steps, as transformers does
STRATEGIES = ("group_by_length", "random", "sequential")


class Request(NamedTuple):
    """A row, by its place in the index, and the budget of its images."""

    place: int
    budget: int


class StepSampler(Sampler[Request]):
    """
    Yields the rows of an epoch in the order of training, each with the budget of its step.

    With `group_by_length` the rows of a step are all with images or all without, and of similar length: a step's
    padding is little, and no process waits for another's longer batch. What is left over at the end of an epoch makes
    up mixed steps. Every row comes once per epoch.

    Args:
        lengths: (rows,) length of each row's text, in any unit.
        images: (rows,) number of images of each row.
        step_rows: rows per optimizer step, of all processes and accumulated batches.
        budgets: visual tokens per image to choose from; each step draws one.
        seed: of order and budgets.
        strategy: one of `STRATEGIES`, named as transformers' `train_sampling_strategy`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        images: np.ndarray,
        step_rows: int,
        budgets: Sequence[int],
        seed: int,
        strategy: str = "group_by_length",
    ):
        self.lengths, self.with_images = np.asarray(lengths), np.asarray(images) > 0
        self.step_rows, self.budgets, self.seed, self.strategy = step_rows, tuple(budgets), seed, strategy
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Request]:
        rows = len(self.lengths)
        chance = np.random.default_rng([self.seed, self.epoch, 1])
        picks = chance.integers(len(self.budgets), size=-(-rows // self.step_rows))
        for position, place in enumerate(self.order()):
            yield Request(int(place), self.budgets[picks[position // self.step_rows]])

    def order(self) -> np.ndarray:
        """(rows,) places, in the order of the epoch."""
        chance = np.random.default_rng([self.seed, self.epoch, 0])
        if self.strategy == "sequential":
            return np.arange(len(self.lengths))
        if self.strategy == "random":
            return chance.permutation(len(self.lengths))
        steps: list[np.ndarray] = []
        left_over: list[np.ndarray] = []
        for kind in (True, False):
            places = chance.permutation(np.flatnonzero(self.with_images == kind))
            whole = len(places) - len(places) % self.step_rows
            left_over.append(places[whole:])
            pool_rows = POOL_STEPS * self.step_rows
            for start in range(0, whole, pool_rows):
                pool = places[start : min(start + pool_rows, whole)]
                pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
                steps += np.split(pool, len(pool) // self.step_rows)
        steps = [steps[index] for index in chance.permutation(len(steps))]
        return np.concatenate([*steps, *left_over])
