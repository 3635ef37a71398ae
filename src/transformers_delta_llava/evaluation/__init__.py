"""Benchmarks: easy-VQA, test sets of several tasks, and lmms-eval's tasks."""

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
from .test_sets import TaskQuestion, evaluate_tasks, load_test_set, majority_of_training


__all__ = [
    "BudgetResult",
    "Question",
    "Score",
    "TaskQuestion",
    "answer_questions",
    "draw_test_questions",
    "evaluate_easy_vqa",
    "evaluate_tasks",
    "expand_settings",
    "load_questions",
    "load_test_set",
    "majority_answers",
    "majority_of_training",
    "score_answers",
    "wilson_interval",
]
