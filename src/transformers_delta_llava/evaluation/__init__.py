"""Benchmarks: easy-VQA, and lmms-eval's tasks."""

from .easy_vqa import (
    BudgetResult,
    Question,
    answer_questions,
    draw_test_questions,
    evaluate_easy_vqa,
    expand_settings,
    load_questions,
    majority_answers,
)
from .scores import Score, score_answers, wilson_interval


__all__ = [
    "BudgetResult",
    "Question",
    "Score",
    "answer_questions",
    "draw_test_questions",
    "evaluate_easy_vqa",
    "expand_settings",
    "load_questions",
    "majority_answers",
    "score_answers",
    "wilson_interval",
]
