"""The held-out questions of `build_data.py`, and the scores of a model on them by task.

    python -m examples.smol.test_set REPO [--data smol-data] [--num-visual-tokens 16 64 4 1] [--limit 20] [--output scores.json]

Each setting is compared with the majority's answer of the training data and with the model without the image.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from examples.easy_vqa_questions import Score, get_answers
from transformers_delta_llava.loading import load_repo


MAX_NEW_TOKENS = 24  # of a sentence that describes an image


class TaskQuestion(NamedTuple):
    """A question of a task, its answer and the image's file; with `key`, every answer that has this word is right."""

    task: str
    text: str
    answer: str
    image: str | None
    key: str | None = None

    def without_image(self) -> "TaskQuestion":
        """The same question without its image."""
        return self._replace(image=None)

    def is_right(self, answer: str) -> bool:
        """Whether an answer is right, ignoring case and punctuation."""
        return self.key in _words(answer) if self.key is not None else _words(answer) == _words(self.answer)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9$.:]+", text.lower().rstrip(". "))


def load_test_set(folder: Path, limit: int | None = None) -> list[TaskQuestion]:
    """The questions of `test.json`, whose images are in `images/`; with `limit` at most so many of each task."""
    rows = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    questions = [
        TaskQuestion(
            row["task"], row["question"], row["answer"], str(folder / "images" / row["image"]), row.get("key")
        )
        for row in rows
    ]
    tasks = dict.fromkeys(question.task for question in questions)
    return [question for task in tasks for question in [q for q in questions if q.task == task][:limit]]


def score_tasks(questions: Sequence[TaskQuestion], answers: Sequence[str]) -> dict[str, Score]:
    """Right answers by task, in the order of the test set."""
    right: Counter[str] = Counter()
    for question, answer in zip(questions, answers, strict=True):
        right[question.task] += question.is_right(answer)
    return {task: Score(right[task], total) for task, total in Counter(q.task for q in questions).items()}


def majority_of_training(folder: Path, questions: Sequence[TaskQuestion]) -> list[str]:
    """For each question the answer that it has most often in `finetune.json`; empty where it is not asked there."""
    counts: dict[str, Counter[str]] = {}
    for row in json.loads((folder / "finetune.json").read_text(encoding="utf-8")):
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2]):
            counts.setdefault(question, Counter())[answer] += 1
    return [counts[q.text].most_common(1)[0][0] if q.text in counts else "" for q in questions]


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[TaskQuestion],
    budgets: Sequence[int | str],
    majority: Sequence[str],
    batch_size: int = 32,
) -> Iterator[dict[str, Any]]:
    """Yields `asked`, `scores` by task and, of the model, `answers` and `mean_visual_tokens`, setting by setting."""
    yield {"asked": "majority", "scores": score_tasks(questions, majority)}
    for budget in (None, *budgets):
        asked = [q.without_image() for q in questions] if budget is None else questions
        answers = get_answers(model, processor, asked, budget, batch_size, MAX_NEW_TOKENS)
        texts = [answer.text for answer in answers]
        yield {
            "asked": "without image" if budget is None else f"{budget} visual tokens",
            "mean_visual_tokens": sum(answer.visual_tokens for answer in answers) / len(answers),
            "scores": score_tasks(questions, texts),
            "answers": texts,
        }


def main() -> None:
    """Ask, print, write."""
    parser = argparse.ArgumentParser(description="Score a model on the held-out questions, by task.")
    parser.add_argument("repo")
    parser.add_argument("--data", type=Path, default=Path("smol-data"))
    parser.add_argument("--num-visual-tokens", nargs="+", default=["16"])
    parser.add_argument("--limit", type=int, help="ask so many questions of each task")
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    questions = load_test_set(arguments.data, arguments.limit)
    model, processor = load_repo(arguments.repo)
    budgets = [int(word) if word.isdecimal() else word for word in arguments.num_visual_tokens]
    majority = majority_of_training(arguments.data, questions)
    results = list(evaluate(model, processor, questions, budgets, majority))
    table = Table("asked", *results[0]["scores"])
    for result in results:
        cells = [f"{s.accuracy:.0f} ({s.interval[0]:.0f} to {s.interval[1]:.0f})" for s in result["scores"].values()]
        table.add_row(result["asked"], *cells)
    Console().print(table)
    if arguments.output is not None:
        rows = [{**r, "scores": {task: score.to_dict() for task, score in r["scores"].items()}} for r in results]
        report = {"questions": len(questions), "results": rows}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
