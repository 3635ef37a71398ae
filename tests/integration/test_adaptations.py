"""The model where it does not fit or must be fast: offloaded, compiled, quantised. By the code of docs/engines.md, without the package."""

import json

import pytest

from examples.easy_vqa_questions import Question, answer_questions, draw_test_questions, score_answers
from tests.integration.engines import Engine, needs
from tests.pages import filled, read_blocks
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


pytestmark = needs("adaptations")


OFFLOADED = read_blocks("engines.md", "accelerate")
COMPILED = read_blocks("engines.md", "torch.compile")
QUANTISED = read_blocks("engines.md", "Quantised")
PLAIN = ["Parameter float32"]


@pytest.fixture
def engine(tmp_path) -> Engine:
    return Engine("adaptations", tmp_path)


@pytest.fixture(scope="module")
def many_questions() -> list[Question]:
    return draw_test_questions(400)


def accuracy(questions: list[Question], texts: list[str]) -> float:
    return score_answers([question.answer for question in questions], texts)["overall"].accuracy


@pytest.fixture(scope="module")
def plain_accuracy(repo, many_questions) -> float:
    """In percent, of the model as it is."""
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo)
    texts = answer_questions(model, DeltaLlavaProcessor.from_pretrained(repo), many_questions)
    return accuracy(many_questions, texts)


def asked(questions: list[Question]) -> list[dict]:
    return [{"image": question.image, "text": question.text} for question in questions]


def test_parts_on_disk_by_hand(engine, repo, cases, expected):
    by_hand, _ = OFFLOADED
    report = engine.run("adapted.py", repo, stdin={"code": filled(by_hand.text, {"REPO": str(repo)}), "cases": cases})
    assert report["package_importable"] is False
    stored = {part for part, size in report["stored"].items() if size}
    assert stored == {"model.language_model"}
    assert report["answers"] == expected


@pytest.mark.parametrize("part", ["model.vision_tower", "model.multi_modal_projector", "lm_head"])
def test_any_part_on_disk(part, engine, repo, cases, expected):
    by_hand, _ = OFFLOADED
    code = filled(by_hand.text, {"REPO": str(repo), f'"{part}": "cpu"': f'"{part}": "disk"'})
    report = engine.run("adapted.py", repo, stdin={"code": code, "cases": cases})
    assert report["stored"][part] > 0
    assert report["answers"] == expected


@pytest.mark.parametrize("memory", ["2MB", "1MB", "1KB"])
def test_parts_on_disk_by_room(memory, engine, repo, cases, expected):
    by_hand, by_room = OFFLOADED
    imports = by_hand.text.splitlines()[0]  # blocks follow on each other
    code = filled(f"{imports}\n{by_room.text}", {"REPO": str(repo), '{"cpu": "20GiB"}': f'{{"cpu": "{memory}"}}'})
    report = engine.run("adapted.py", repo, stdin={"code": code, "cases": cases})
    assert any(report["stored"].values())
    if memory == "1KB":
        assert all(report["stored"].values())  # something of every part
    assert report["answers"] == expected


def test_compiled(engine, repo, cases, expected, questions):
    (block,) = COMPILED
    chosen = [
        0,
        2,
        10,
        11,
    ]  # the default, another budget, two images with a budget each, text only: a compilation takes seconds
    cases, expected = [cases[index] for index in chosen], [expected[index] for index in chosen]
    given = {"code": filled(block.text, {"REPO": str(repo), "photo.jpg": questions[0].image}), "cases": cases}
    report = engine.run("compiled.py", repo, stdin=given, TORCHINDUCTOR_COMPILE_THREADS="1")
    assert report["package_importable"] is False
    assert report["page_difference"] < 1e-3
    assert report["page_output"] == report["plain_output"]
    assert report["forward_breaks"] == report["generation_breaks"] == {}
    assert max(report["differences"]) < 1e-3
    tokens = [answer["tokens"] for answer in expected]
    assert report["tokens"] == [*tokens, tokens[0]]
    assert set(report["graphs"]) == {1}  # one for all tokens of all cases


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes"])
def test_quantised(method, engine, repo, many_questions, plain_accuracy):
    code = filled({"torchao": QUANTISED[0], "bitsandbytes": QUANTISED[1]}[method].text, {"REPO": str(repo)})
    report = engine.run("adapted.py", repo, stdin={"code": code, "questions": asked(many_questions)})
    assert report["package_importable"] is False
    language_model = report["parts"].pop("model.language_model")
    assert all(kinds == PLAIN for kinds in report["parts"].values()), json.dumps(report["parts"])
    assert any(kind not in PLAIN for kind in language_model)
    assert accuracy(many_questions, report["texts"]) > plain_accuracy - 1
