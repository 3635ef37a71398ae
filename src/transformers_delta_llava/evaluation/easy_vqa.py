"""easy-VQA (Victor Zhou, 2019, MIT): one coloured shape on a plain ground, questions in a few fixed wordings, 13 answers.

The package `easy-vqa` on PyPI holds all of it: 4,000 training images with 38,575 questions, and 1,000 test images with
9,673 questions.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.prompts import check_prompt, check_texts, max_prompt_tokens
from .scores import Score, score_answers


MAX_NEW_TOKENS = 8  # no answer needs more


class Question(NamedTuple):
    """A question, its right answer, the number of the image in its split, and the image's file."""

    text: str
    answer: str
    image_id: int
    image: str


def load_questions(split: str) -> list[Question]:
    """
    All questions of `"train"` or `"test"`, in the order of the package.

    Raises:
        ValueError: for another split, or where the package is not installed.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise ValueError("easy-VQA is not installed: pip install easy-vqa (3 MB, it brings the images).") from error
    if split == "train":
        questions, images = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    elif split == "test":
        questions, images = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    else:
        raise ValueError(f"split={split!r}: easy-VQA has train and test.")
    return [Question(text, answer, image, images[image]) for text, answer, image in zip(*questions)]


def draw_test_questions(limit: int | None = None) -> list[Question]:
    """
    The test questions, or `limit` of them: always the same ones, drawn from all images.

    Raises:
        ValueError: a limit below 1, or the package is not installed.
    """
    questions = load_questions("test")
    if limit is None or limit >= len(questions):
        return questions
    if limit < 1:
        raise ValueError(f"limit={limit}: ask at least one question.")
    chosen = sorted(random.Random(0).sample(range(len(questions)), limit))
    return [questions[index] for index in chosen]


def majority_answers(train: Sequence[Question], questions: Sequence[Question]) -> list[str]:
    """Guesses without the image: for each question the answer that it most often had in training."""
    overall = Counter(question.answer for question in train).most_common(1)[0][0]
    counts: dict[str, Counter[str]] = {}
    for question in train:
        counts.setdefault(question.text, Counter())[question.answer] += 1
    return [counts[q.text].most_common(1)[0][0] if q.text in counts else overall for q in questions]


@torch.inference_mode()
def answer_questions(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    questions: Sequence[Any],
    num_visual_tokens: int | str | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
    auto_max_loss: float | None = None,
    on_budgets: Callable[[list[int]], None] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """
    The model's answers, generated greedily in batches through the processor's chat template, stripped of blanks.

    Args:
        model: on any device; it is used in evaluation mode and left in it.
        processor: its own; prompts are padded on the left.
        questions: each with `text` and `image`, as those of `load_questions`; all without an image (`None`), or none.
        num_visual_tokens: visual tokens per image, or `"auto"`; the processor's default when `None`.
        batch_size: questions at a time.
        on_batch: called with the number of questions answered in each batch.
        auto_max_loss: what `"auto"` may lose of an image; the processor's default when `None`.
        on_budgets: called with the visual tokens that each image of a batch got.
        max_new_tokens: where an answer is cut off.

    Raises:
        ValueError: a batch size below 1, a budget that the model does not have, a loss that is not a share, or a question
            that is longer than the model's positions.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: ask at least one question at a time.")
    model.eval()
    limit = max_prompt_tokens(model.config)
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        for question in batch:
            check_texts([question.text], processor.tokenizer, limit)
        inputs = processor.apply_chat_template(
            [_conversation(question) for question in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs=_options(num_visual_tokens=num_visual_tokens, auto_max_loss=auto_max_loss),
        ).to(model.device, model.dtype)
        check_prompt(inputs["input_ids"].shape[1], limit)
        if on_budgets is not None:
            budgets = inputs.get("num_visual_tokens")
            on_budgets([processor.image_seq_length] * len(batch) if budgets is None else budgets.tolist())
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
        if on_batch is not None:
            on_batch(len(batch))
    return answers


def _options(**given: Any) -> dict[str, Any]:
    """Options of a processor's call, a new dictionary for each: transformers writes into it."""
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    return options | {name: value for name, value in given.items() if value is not None}


def _conversation(question: Any) -> list[dict[str, Any]]:
    image = [] if question.image is None else [{"type": "image", "url": question.image}]
    return [{"role": "user", "content": [*image, {"type": "text", "text": question.text}]}]


@dataclass(frozen=True)
class BudgetResult:
    """Scores at one setting: `num_visual_tokens`, with `auto_max_loss` where that is `"auto"`.

    `budgets` counts, per number of visual tokens, the questions that were asked with it.
    """

    num_visual_tokens: int | str
    auto_max_loss: float | None
    seconds: float
    budgets: dict[int, int]
    scores: dict[str, Score]

    @property
    def mean_visual_tokens(self) -> float:
        """Per question."""
        return sum(budget * count for budget, count in self.budgets.items()) / sum(self.budgets.values())

    def to_dict(self) -> dict[str, Any]:
        """What a JSON report holds."""
        result: dict[str, Any] = {"num_visual_tokens": self.num_visual_tokens, "seconds": round(self.seconds, 1)}
        result["scores"] = {name: score.to_dict() for name, score in self.scores.items()}
        if self.auto_max_loss is not None:
            result |= {"auto_max_loss": self.auto_max_loss, "mean_visual_tokens": self.mean_visual_tokens}
            result["budgets"] = {str(budget): count for budget, count in self.budgets.items()}
        return result


def expand_settings(
    processor: DeltaLlavaProcessor, budgets: Sequence[int | str], auto_max_losses: Sequence[float] | None = None
) -> list[tuple[int | str, float | None]]:
    """
    Every budget with `None`, and `"auto"` with every one of `auto_max_losses`, by default the processor's own.

    Raises:
        ValueError: a budget that the processor does not have, a loss that is not a share, or losses without `"auto"`.
    """
    processor.resolve_num_visual_tokens(budgets)
    for loss in auto_max_losses or []:
        if not 0 <= loss <= 1:
            raise ValueError(f"auto_max_loss={loss}: use a share from 0 to 1.")
    if auto_max_losses and "auto" not in budgets:
        raise ValueError("auto_max_loss goes with num_visual_tokens=auto.")
    losses = auto_max_losses or [processor.auto_max_loss]
    return [(budget, loss) for budget in budgets for loss in (losses if budget == "auto" else [None])]


def evaluate_easy_vqa(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    questions: Sequence[Question],
    settings: Sequence[tuple[int | str, float | None]],
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[list[BudgetResult], dict[str, Score]]:
    """
    Scores of the model's answers at every one of `settings` (see `expand_settings`), and those of `majority_answers`.

    Args:
        model, processor, questions, batch_size, on_batch: see `answer_questions`.
        settings: numbers of visual tokens and what `"auto"` may lose.

    Raises:
        ValueError: see `answer_questions`.
    """
    truths = [question.answer for question in questions]
    results = []
    for budget, loss in settings:
        spent: list[int] = []
        start = time.perf_counter()
        answers = answer_questions(model, processor, questions, budget, batch_size, on_batch, loss, spent.extend)
        seconds = time.perf_counter() - start
        budgets = dict(sorted(Counter(spent).items(), reverse=True))
        results.append(BudgetResult(budget, loss, seconds, budgets, score_answers(truths, answers)))
    return results, score_answers(truths, majority_answers(load_questions("train"), questions))
