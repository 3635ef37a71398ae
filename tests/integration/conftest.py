"""One trained repo for all engines, what it is asked, and what transformers answers in this environment."""

import os
from pathlib import Path

import pytest

from examples.easy_vqa_questions import Question, draw_test_questions
from tests.integration.engine_scripts.answer import answer
from tests.integration.engines import ROOT
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.conversion import convert_checkpoint


CHECKPOINT = ROOT / "examples" / "easy-vqa"


@pytest.fixture(scope="session")
def repo(tmp_path_factory) -> Path:
    """The shipped easy-VQA checkpoint, converted: 16 visual tokens by default; also 64, 4 and 1. The environment variable
    DELTA_LLAVA_REPO names another one in float32 with these budgets."""
    if "DELTA_LLAVA_REPO" in os.environ:
        return Path(os.environ["DELTA_LLAVA_REPO"]).resolve()
    folder = tmp_path_factory.mktemp("repo") / "easy-vqa"
    convert_checkpoint(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    """Some of easy-VQA's test questions, always the same."""
    return draw_test_questions(8)


@pytest.fixture(scope="session")
def cases(questions) -> list[dict]:
    """One image at every budget, two images, with a budget each, and text only."""

    def ask(text: str, *images: str) -> list[dict]:
        return [*({"type": "image", "url": image} for image in images), {"type": "text", "text": text}]

    first, second = questions[:2]
    single = [ask(question.text, question.image) for question in questions]
    double = ask("is there a red shape?", first.image, second.image)
    budgets = [None, 16, 4, 1, 64, None, 4, 1]
    found = [{"content": content, "num_visual_tokens": budget} for content, budget in zip(single, budgets)]
    found += [{"content": double, "num_visual_tokens": budget} for budget in (None, 4, [16, 1])]
    return [*found, {"content": ask("what shape is in the image?"), "num_visual_tokens": None}]


@pytest.fixture(scope="session")
def expected(repo, cases) -> list[dict]:
    """What the package's own classes answer here, one case at a time."""
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo).eval()
    processor = DeltaLlavaProcessor.from_pretrained(repo)
    return [answer(model, processor, case) for case in cases]
