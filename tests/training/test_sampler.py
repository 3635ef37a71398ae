"""The order of rows: groups of one modality and similar length, the same for the same seed and epoch."""

import numpy as np
import pytest

from transformers_delta_llava.training.sampler import Request, StepSampler


RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 1000, 1003)
IMAGES = (RNG.random(1003) < 0.7).astype(int)


def sampler(**changes: object) -> StepSampler:
    options = {"step_rows": 16, "budgets": (144,), "seed": 1, **changes}
    return StepSampler(LENGTHS, IMAGES, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["group_by_length", "random", "sequential"])
def test_every_row_comes_once(strategy: str) -> None:
    rows = [request.row for request in sampler(strategy=strategy)]
    assert sorted(rows) == list(range(1003))
    assert (rows == list(range(1003))) == (strategy == "sequential")


def test_steps_have_one_modality_and_similar_lengths() -> None:
    order = sampler().order()
    steps = [order[start : start + 16] for start in range(0, 1003, 16)]
    mixed = [index for index, step in enumerate(steps) if len(set(IMAGES[step])) > 1]
    assert mixed in ([], [len(steps) - 2], [len(steps) - 1], [len(steps) - 2, len(steps) - 1])
    spread = np.mean([np.ptp(LENGTHS[step]) for step in steps[:-2]])
    assert spread < 0.1 * np.mean([np.ptp(step) for step in np.split(RNG.permutation(LENGTHS)[:992], 62)])
    kinds = [IMAGES[step[0]] for step in steps[:-2]]
    assert np.sum(np.diff(kinds) != 0) > 0, "all images first, then all text"


def test_epochs_differ_and_repeat() -> None:
    one, two = sampler(budgets=(144, 36, 1)), sampler(budgets=(144, 36, 1))
    first = list(one)
    assert first == list(two)
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first
    assert list(sampler(budgets=(144, 36, 1), seed=2)) != first


def test_a_step_has_one_budget_and_all_budgets_come() -> None:
    requests = list(sampler(budgets=(144, 36, 1)))
    steps = [{request.budget for request in requests[start : start + 16]} for start in range(0, 1003, 16)]
    assert all(len(step) == 1 for step in steps)
    counts = [steps.count({budget}) for budget in (144, 36, 1)]
    assert min(counts) >= 12 and sum(counts) == 63
    assert isinstance(requests[0], Request)
