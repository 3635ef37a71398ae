"""The checkpoint that the repository ships: small, in the authors' layout, and as good as its card says."""

import json
from pathlib import Path

import pytest

from examples.easy_vqa_questions import answer_questions, draw_test_questions, score_answers
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.conversion import export_checkpoint, inspect_model


CHECKPOINT = Path(__file__).parents[2] / "examples" / "easy-vqa"


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= 8_000_000


def test_export_gives_back_the_files_that_are_here(easy_vqa_repo: Path, tmp_path: Path):
    export_checkpoint(easy_vqa_repo, tmp_path / "back")
    for file in (tmp_path / "back").rglob("*"):
        if file.suffix in (".safetensors", ".jinja"):
            assert file.read_bytes() == (CHECKPOINT / file.name).read_bytes()
        elif file.is_file():
            here = json.loads((CHECKPOINT / file.relative_to(tmp_path / "back")).read_text())
            there = json.loads(file.read_text())
            for values in (here, there):
                values.pop("transformers_version", None)
            assert there == here, file.name


def test_nothing_in_it_is_unknown_or_left_out(easy_vqa_repo: Path):
    inspection = inspect_model(easy_vqa_repo)
    assert inspection.chat_template is not None and inspection.chat_template.name == "vicuna_v1"
    assert inspection.problems == []


@pytest.mark.parametrize("budget", [16, 1])
def test_it_sees(easy_vqa_repo: Path, budget: int):
    """200 questions; from the question only two thirds of all are answered right."""
    questions = draw_test_questions(200)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(easy_vqa_repo)
    answers = answer_questions(model, DeltaLlavaProcessor.from_pretrained(easy_vqa_repo), questions, budget)
    score = score_answers([question.answer for question in questions], answers)["overall"]
    results = json.loads((CHECKPOINT / "results.json").read_text())["results"]
    (measured,) = (entry["scores"]["overall"] for entry in results if entry["num_visual_tokens"] == budget)
    assert score.accuracy > measured["accuracy"] - 3  # of all 9,673; a sample of 200 strays by less
    assert measured["accuracy"] >= 97
