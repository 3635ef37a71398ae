"""Benchmarks with a right answer: easy-VQA."""

from .easy_vqa import Question, answer_questions, draw_test_questions, load_questions, majority_answers
from .scores import Score, score_answers, wilson_interval


__all__ = [
    "Question",
    "Score",
    "answer_questions",
    "draw_test_questions",
    "load_questions",
    "majority_answers",
    "score_answers",
    "wilson_interval",
]
