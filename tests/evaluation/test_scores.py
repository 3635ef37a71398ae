import math

import pytest

from transformers_delta_llava.evaluation import Score, score_answers, wilson_interval


@pytest.mark.parametrize("correct, total", [(0, 10), (5, 10), (10, 10), (99, 100), (9600, 9673)])
def test_wilson_interval_holds_the_shares_that_a_score_test_accepts(correct: int, total: int) -> None:
    # The interval's definition: at its ends the observed share is 1.96 standard errors of that end away.
    share = correct / total
    for end in wilson_interval(correct, total):
        error = math.sqrt(end * (1 - end) / total)
        assert abs(share - end) == pytest.approx(1.959964 * error, abs=1e-6)


def test_wilson_interval_of_published_example() -> None:
    # 81 of 263: Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_wilson_interval_says_nothing_without_questions() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_more_right_answers_than_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="correct=3: it must be from 0 to total, 2"):
        wilson_interval(3, 2)


def test_answers_are_scored_by_kind_of_question() -> None:
    truths = ["yes", "no", "no", "circle", "red"]
    scores = score_answers(truths, ["yes", "yes", "no", "circle", "Red"])
    assert scores == {"overall": Score(3, 5), "yes/no": Score(2, 3), "open": Score(1, 2)}
    assert scores["open"].to_dict() == {
        "correct": 1,
        "total": 2,
        "accuracy": 50.0,
        "interval_95": [9.45, 90.55],
    }


def test_every_question_needs_an_answer() -> None:
    with pytest.raises(ValueError, match="There are 1 answers to 2 questions"):
        score_answers(["yes", "no"], ["yes"])
