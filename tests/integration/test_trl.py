"""TRL's SFTTrainer and PEFT teach the easy-VQA model words it has not heard, where the package is not installed."""

import json

import pytest

from examples.easy_vqa_questions import (
    Question,
    answer_questions,
    draw_test_questions,
    load_questions,
    score_answers,
)
from tests.integration.engines import Engine, needs
from tests.pages import filled, read_blocks
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


pytestmark = needs("trl")


# Wordings that easy-VQA does not have, for two of its questions.
NEW_WORDS = {"what color is the shape?": "name the paint", "what shape is in the image?": "name the figure"}


def reworded(questions: list[Question]) -> list[Question]:
    return [question._replace(text=NEW_WORDS[question.text]) for question in questions if question.text in NEW_WORDS]


def accuracy(folder, questions: list[Question]) -> float:
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder)
    answers = answer_questions(model, DeltaLlavaProcessor.from_pretrained(folder), questions)
    return score_answers([question.answer for question in questions], answers)["overall"].accuracy


@pytest.fixture(scope="module")
def old_questions() -> list[Question]:
    return draw_test_questions(300)


@pytest.fixture(scope="module")
def new_questions() -> list[Question]:
    return reworded(load_questions("test"))[:300]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """New words for training images, the old questions so that they are not forgotten, text only, and pairs of images."""
    train = load_questions("train")
    new, old = reworded(train)[:600], train[:600]
    asked = [{"images": [q.image], "question": q.text, "answer": q.answer} for q in new + old]
    asked += [{"images": [], "question": f"is a {q.answer} thing {q.answer}?", "answer": "yes"} for q in new[:60]]
    for one, two in zip(new[:60], new[60:120]):
        asked.append({"images": [one.image, two.image], "question": "how many images?", "answer": "two"})
    return asked


@pytest.mark.parametrize("flags", [[], ["--lora"]], ids=["everything", "LoRA and projector"])
def test_new_words_are_learned_and_old_ones_kept(flags, repo, rows, old_questions, new_questions, tmp_path):
    engine = Engine("trl", tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    report = engine.run("finetune.py", repo, tmp_path / "rows.json", tmp_path / "tuned", *flags)

    assert report["package_importable"] is False
    assert set(report["labels"]) <= {f" {row['answer']}</s>" for row in rows} | {
        f"{row['answer']}</s>" for row in rows
    }
    losses = report["losses"]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    before, after = accuracy(repo, new_questions), accuracy(tmp_path / "tuned", new_questions)
    assert before < 5 and after > 90
    assert accuracy(tmp_path / "tuned", old_questions) >= accuracy(repo, old_questions) - 3
    if flags:
        names = {name.rsplit(".", 2)[-2] for name in report["trainable"] if "lora_" in name}
        assert names == {"default"} and any(".delta_u" in name for name in report["trainable"])
        assert not any("vision_tower" in name for name in report["trainable"])
        assert report["difference"] < 1e-3


def test_rewards_at_another_number_of_visual_tokens(repo, tmp_path):
    questions = [question for question in load_questions("train")[:64] if question.text in NEW_WORDS]
    rows = [{"image": q.image, "question": q.text, "answer": q.answer} for q in questions]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    report = Engine("trl", tmp_path).run("rewarded.py", repo, tmp_path / "rows.json", 4)
    assert report["package_importable"] is False and report["placeholders"] == [4]
    assert len(report["rewards"]) == 12 and any(gradient > 0 for gradient in report["gradients"])
    assert sum(report["rewards"]) / 12 > 0.5  # the model sees its images, at four times fewer tokens than its own


def test_code_of_the_page(repo, rows, tmp_path):
    (block,) = read_blocks("engines.md", "TRL and PEFT")
    before = "import functools, trl\nfrom datasets import Dataset, Image, List\n"
    before += 'small = {"use_cpu": True, "bf16": False, "max_steps": 2, "report_to": "none", "save_strategy": "no"}\n'
    before += "trl.SFTConfig = functools.partial(trl.SFTConfig, **small)\n"
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            "images": row["images"],
        }
        for row in [*rows[:30], *rows[-2:]]
    ]
    before += f'rows = Dataset.from_list({chats!r}).cast_column("images", List(Image()))'
    code = filled(block.text, {"REPO": str(repo)})
    show = ["trainer.state.global_step", "sorted({n for n, p in trainer.model.named_parameters() if p.requires_grad})"]
    steps, trainable = Engine("trl", tmp_path).run("run_code.py", stdin={"code": [before, code], "show": show})[
        "shown"
    ]
    assert steps == 2
    assert any("lora_" in name for name in trainable) and any(".delta_u" in name for name in trainable)
