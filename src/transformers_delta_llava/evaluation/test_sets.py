"""Test sets of several tasks, as `examples/smol/build_data.py` writes them: one question an image."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.errors import DeltaLlavaError
from ..utils.files import parse_json, read_text
from ..utils.validation import FileModel, validate
from .easy_vqa import answer_questions
from .scores import Score


MAX_NEW_TOKENS = 24  # of a sentence that describes an image


class _Row(FileModel):
    task: str
    image: str
    question: str
    answer: str
    key: str | None = None


class _Rows(FileModel):
    rows: list[_Row]


class TaskQuestion(NamedTuple):
    """What is asked of which task, what is right, and the image's file; with `key`, naming this word is right."""

    task: str
    text: str
    answer: str
    image: str | None
    key: str | None = None

    def without_image(self) -> "TaskQuestion":
        """The same question, asked in words alone."""
        return self._replace(image=None)

    def is_right(self, said: str) -> bool:
        """Whether an answer is right, whatever its case and punctuation."""
        words = _words(said)
        return self.key in words if self.key is not None else words == _words(self.answer)


def load_test_set(folder: Path, limit: int | None = None) -> list[TaskQuestion]:
    """The questions of `test.json` in a folder, whose images are in `images/`; with `limit` at most so many of each task.

    Raises:
        DeltaLlavaError: no such file, or a row that is not a question.
    """
    file = folder / "test.json"
    if not file.is_file():
        raise DeltaLlavaError(f"{folder} has no test.json; `python examples/smol/build_data.py` makes one.")
    rows = validate(_Rows, {"rows": parse_json(read_text(file))}, file.name).rows
    images = folder / "images"
    questions = [TaskQuestion(row.task, row.question, row.answer, str(images / row.image), row.key) for row in rows]
    tasks = dict.fromkeys(question.task for question in questions)
    return [question for task in tasks for question in [q for q in questions if q.task == task][:limit]]


def score_tasks(questions: Sequence[TaskQuestion], answers: Sequence[str]) -> dict[str, Score]:
    """Right answers of each task, in the order of the test set."""
    right: Counter[str] = Counter()
    for question, said in zip(questions, answers, strict=True):
        right[question.task] += question.is_right(said)
    totals = Counter(question.task for question in questions)
    return {task: Score(right[task], total) for task, total in totals.items()}


def majority_of_training(folder: Path, questions: Sequence[TaskQuestion]) -> list[str]:
    """For each question the answer that it has most often in `finetune.json` of the test set's folder; empty where that
    file does not have the question."""
    counts: dict[str, Counter[str]] = {}
    for row in parse_json(read_text(folder / "finetune.json")):
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2]):
            counts.setdefault(question, Counter())[answer] += 1
    return [counts[q.text].most_common(1)[0][0] if q.text in counts else "" for q in questions]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9$.:]+", text.lower().rstrip(". "))


def evaluate_tasks(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    questions: Sequence[TaskQuestion],
    budgets: Sequence[int | str],
    majority: Sequence[str],
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """
    Scores at each setting, as it is done: the majority's, the model's without images, then at each budget.

    Args:
        majority: an answer to each question, of `majority_of_training`.

    Yields:
        `asked` (the setting's name), `scores` by task and, of the model, `answers` and `mean_visual_tokens`.

    Raises:
        ValueError: a budget that the model does not have, or as `answer_questions`.
    """
    processor.resolve_num_visual_tokens(budgets)
    yield {"asked": "majority", "scores": score_tasks(questions, majority)}
    for budget in (None, *budgets):
        asked = [question.without_image() for question in questions] if budget is None else questions
        spent: list[int] = []
        answers = answer_questions(
            model, processor, asked, budget, batch_size, on_batch, None, spent.extend, MAX_NEW_TOKENS
        )
        yield {
            "asked": "without image" if budget is None else f"{budget} visual tokens",
            "mean_visual_tokens": 0 if budget is None else sum(spent) / len(spent),
            "scores": score_tasks(questions, answers),
            "answers": answers,
        }
