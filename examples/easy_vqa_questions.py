"""easy-VQA (Victor Zhou, 2019, MIT): one coloured shape per image, questions in a few fixed wordings, 13 answers.

    pip install easy-vqa
    python -m examples.easy_vqa_questions REPO [--num-visual-tokens 16 4 1] [--limit 1000] [--output results.json]
    python -m examples.easy_vqa_questions --write test.jsonl  # input of delta-llava generate

The package brings 4,000 training images with 38,575 questions, and 1,000 test images with 9,673 questions.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import easy_vqa
from rich.console import Console
from rich.table import Table

from transformers_delta_llava.generate import Answer, Request, ask, generate, wilson_interval
from transformers_delta_llava.loading import load_repo


class Question(NamedTuple):
    """A question, its answer, the number of the image in its split, and the image's file."""

    text: str
    answer: str
    image_id: int
    image: str


def load_questions(split: str) -> list[Question]:
    """All questions of `"train"` or `"test"`, in the order of the package."""
    questions, images = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }[split]
    paths = images()
    return [Question(text, answer, image, paths[image]) for text, answer, image in zip(*questions())]


def draw_test_questions(limit: int | None = None) -> list[Question]:
    """The test questions, or `limit` of them: the same ones every time, drawn from all images."""
    questions = load_questions("test")
    if limit is None or limit >= len(questions):
        return questions
    return [questions[index] for index in sorted(random.Random(0).sample(range(len(questions)), limit))]


def majority_answers(train: Sequence[Question], questions: Sequence[Question]) -> list[str]:
    """Guesses without the image: for each question the answer that it most often had in training."""
    counts: dict[str, Counter[str]] = {}
    for question in train:
        counts.setdefault(question.text, Counter())[question.answer] += 1
    return [counts[question.text].most_common(1)[0][0] if question.text in counts else "no" for question in questions]


def get_answers(
    model: Any,
    processor: Any,
    questions: Sequence[Any],
    num_visual_tokens: int | str | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 8,
) -> list[Answer]:
    """
    Greedy answers to questions, in their order.

    Args:
        model, processor: of one repo; the model in evaluation mode.
        questions: with `text` and `image`, a file or `None`.
        num_visual_tokens: per image; the processor's default when `None`.
        batch_size: questions at a time.
        max_new_tokens: length of the longest answer.
    """
    requests = [
        Request(
            str(index),
            ask(q.text, *([] if q.image is None else [q.image])),
            num_visual_tokens,
            max_new_tokens=max_new_tokens,
        )
        for index, q in enumerate(questions)
    ]
    answers = {a.request.id: a for batch, _ in generate(model, processor, requests, batch_size) for a in batch}
    if errors := [answer.error for answer in answers.values() if answer.error]:
        raise ValueError(errors[0])
    return [answers[request.id] for request in requests]


def answer_questions(*args: Any, **kwargs: Any) -> list[str]:
    """The texts of `get_answers`."""
    return [answer.text for answer in get_answers(*args, **kwargs)]


@dataclass(frozen=True)
class Score:
    """`correct` of `total` questions, in percent, with a 95 % Wilson interval, which takes questions for independent."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Percent right."""
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the interval, in percent."""
        low, high = wilson_interval(self.correct, self.total)
        return 100 * low, 100 * high

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        interval = [round(end, 2) for end in self.interval]
        return {
            "correct": self.correct,
            "total": self.total,
            "accuracy": round(self.accuracy, 2),
            "interval_95": interval,
        }


def score_answers(truths: Sequence[str], answers: Sequence[str]) -> dict[str, Score]:
    """Scores by exact match: `overall`, `yes/no` (where the truth is yes or no) and `open`."""
    right = [(truth in ("yes", "no"), truth == answer) for truth, answer in zip(truths, answers, strict=True)]
    closed, open_ = ([is_right for is_closed, is_right in right if is_closed == kind] for kind in (True, False))
    parts = {"overall": closed + open_, "yes/no": closed, "open": open_}
    return {name: Score(sum(part), len(part)) for name, part in parts.items()}


def evaluate(repo: str, budgets: Sequence[int | None], limit: int | None = None) -> dict[str, Any]:
    """Scores of a repo at every number of visual tokens, and those of `majority_answers`, on the CPU in float32."""
    questions = draw_test_questions(limit)
    truths = [question.answer for question in questions]
    model, processor = load_repo(repo, "cpu")
    results = []
    for budget in budgets:
        start = time.perf_counter()
        answers = answer_questions(model, processor, questions, budget)
        seconds = round(time.perf_counter() - start, 1)
        scores = {name: score.to_dict() for name, score in score_answers(truths, answers).items()}
        results.append(
            {"num_visual_tokens": budget or processor.image_seq_length, "seconds": seconds, "scores": scores}
        )
    guesses = score_answers(truths, majority_answers(load_questions("train"), questions))
    alone = {name: score.to_dict() for name, score in guesses.items()}
    head = {"benchmark": "easy-vqa", "split": "test", "questions": len(questions), "dtype": "float32"}
    return {**head, "results": results, "question_alone": alone}


def main() -> None:
    """Score a repo, or write the questions."""
    parser = argparse.ArgumentParser(description="Score a repo on easy-VQA's test questions.")
    parser.add_argument("repo", nargs="?")
    parser.add_argument("--num-visual-tokens", type=int, nargs="+", default=[None])
    parser.add_argument("--limit", type=int, help="ask so many of them, always the same")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--write", type=Path, help="JSONL of the questions to write")
    arguments = parser.parse_args()
    if arguments.write is not None:
        rows = [
            {"id": str(index), "image": question.image, "prompt": question.text, "answer": question.answer}
            for index, question in enumerate(draw_test_questions(arguments.limit))
        ]
        arguments.write.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if arguments.repo is not None:
        report = evaluate(arguments.repo, arguments.num_visual_tokens, arguments.limit)
        table = Table("visual tokens", *report["question_alone"])
        scored = [(str(result["num_visual_tokens"]), result["scores"]) for result in report["results"]]
        for name, scores in [*scored, ("none: majority of the question alone", report["question_alone"])]:
            cells = [
                f"{s['accuracy']:.2f} ({s['interval_95'][0]:.2f} to {s['interval_95'][1]:.2f})"
                for s in scores.values()
            ]
            table.add_row(name, *cells)
        Console().print(table)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
