"""Which rows make up a step, and how many visual tokens its images get.

Both follow from seed and epoch only: a resumed run continues as if it had not stopped, and all processes of a run agree
without communication.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


POOL_STEPS = 50  # rows are sorted by length among those of this many steps, as in transformers
STRATEGIES = ("group_by_length", "random", "sequential")


class Request(NamedTuple):
    """A row, by its position in the index, and the number of visual tokens of each of its images."""

    row: int
    budget: int


class StepSampler(Sampler[Request]):
    """
    Yields the rows of an epoch in the order of training, each with the budget of its step.

    With `group_by_length` the rows of a step all have images or all have none, and are of similar length: steps have
    little padding, and no process waits for the longer batch of another one. The rows left at the end of an epoch make
    up mixed steps. Every row comes once per epoch.

    Args:
        lengths: (rows,) length of each row's text, in any unit.
        images: (rows,) number of images of each row.
        step_rows: rows per optimizer step, over all processes and accumulated batches.
        budgets: numbers of visual tokens per image; each step draws one.
        seed: seed of order and budgets.
        strategy: one of `STRATEGIES`, as in `TrainingArguments.train_sampling_strategy`.
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
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Request]:
        rng = np.random.default_rng([self.seed, self.epoch, 1])
        draws = rng.integers(len(self.budgets), size=-(-len(self) // self.step_rows))
        for position, row in enumerate(self.order()):
            yield Request(int(row), self.budgets[draws[position // self.step_rows]])

    def order(self) -> np.ndarray:
        """(rows,) positions in the index, in the order of the epoch."""
        rng = np.random.default_rng([self.seed, self.epoch, 0])
        if self.strategy == "sequential":
            return np.arange(len(self))
        if self.strategy == "random":
            return rng.permutation(len(self))
        steps: list[np.ndarray] = []
        left_over: list[np.ndarray] = []
        for kind in (True, False):
            rows = rng.permutation(np.flatnonzero(self.with_images == kind))
            in_steps, rest = np.split(rows, [len(rows) - len(rows) % self.step_rows])
            left_over.append(rest)
            for start in range(0, len(in_steps), POOL_STEPS * self.step_rows):
                pool = in_steps[start : start + POOL_STEPS * self.step_rows]
                pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
                steps += np.split(pool, len(pool) // self.step_rows)
        steps = [steps[index] for index in rng.permutation(len(steps))]
        return np.concatenate([*steps, *left_over])
