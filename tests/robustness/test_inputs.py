"""A slice of the cases of `fuzz_inputs`: hundreds more are run by hand."""

import time

import pytest

from tests.robustness.fuzz_inputs import KINDS, LIMIT, run_case


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_end_in_a_result_or_in_one_sentence(kind: str) -> None:
    outcomes = []
    for seed in range(60):
        start = time.monotonic()
        try:
            outcomes.append(run_case(kind, seed))
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
        assert time.monotonic() - start < LIMIT, f"seed {seed}"
    assert {"result", "refused"} == set(outcomes)  # neither kind of case is missing
