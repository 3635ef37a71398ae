import builtins

import pytest
from PIL import Image

from transformers_delta_llava.evaluation import (
    Question,
    answer_questions,
    draw_test_questions,
    load_questions,
    majority_answers,
    score_answers,
)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[Question]:
    folder = tmp_path_factory.mktemp("images")
    asked = []
    for index, colour in enumerate(["red", "green", "blue", "black", "white"]):
        Image.new("RGB", (24, 24), colour).save(folder / f"{index}.png")
        asked.append(Question("what " * (index + 1), colour, index, str(folder / f"{index}.png")))
    return asked


def test_the_package_holds_what_its_author_says() -> None:
    train, test = load_questions("train"), load_questions("test")
    assert (len(train), len({q.image_id for q in train})) == (38575, 4000)
    assert (len(test), len({q.image_id for q in test})) == (9673, 1000)
    assert len({q.answer for q in train + test}) == 13
    assert test[0].image.endswith(f"{test[0].image_id}.png") and "test" in test[0].image


def test_majority_of_the_question_alone() -> None:
    test = load_questions("test")
    scores = score_answers([q.answer for q in test], majority_answers(load_questions("train"), test))
    assert {name: round(score.accuracy, 1) for name, score in scores.items()} == {
        "overall": 67.0,
        "yes/no": 82.5,
        "open": 23.3,
    }


def test_majority_answers_an_unseen_question_with_the_commonest_answer() -> None:
    train = [
        Question("a", "yes", 0, ""),
        Question("a", "no", 0, ""),
        Question("a", "no", 0, ""),
        Question("b", "red", 0, ""),
    ]
    assert majority_answers(train, [Question(text, "", 0, "") for text in "abc"]) == ["no", "red", "no"]


def test_a_limit_draws_the_same_questions_from_all_images() -> None:
    some = draw_test_questions(200)
    assert some == draw_test_questions(200) and len(set(some)) == 200
    assert max(question.image_id for question in some) > 900
    with pytest.raises(ValueError, match="limit=0: ask at least one"):
        draw_test_questions(0)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split='valid': easy-VQA has train and test"):
        load_questions("valid")


def test_a_missing_package_is_one_sentence(monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "easy_vqa":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="easy-VQA is not installed: pip install easy-vqa"):
        load_questions("test")


@pytest.mark.parametrize("budget", [None, 4])
def test_batched_answers_are_those_of_single_questions(tiny_model, processor, questions, budget) -> None:
    counts = []
    together = answer_questions(tiny_model, processor, questions, budget, batch_size=3, on_batch=counts.append)
    alone = [answer_questions(tiny_model, processor, [question], budget)[0] for question in questions]
    assert together == alone
    assert counts == [3, 2]
    assert all(together)  # the comparison would hold of nothing at all


def test_the_budget_reaches_the_projector(tiny_model, processor, questions) -> None:
    shapes = []
    hook = tiny_model.model.multi_modal_projector.register_forward_hook(
        lambda _, __, out: shapes.append(out.shape[:2])
    )
    answer_questions(tiny_model, processor, questions, 9, batch_size=5)
    hook.remove()
    assert shapes == [(5, 9)]


def test_auto_picks_image_by_image(tiny_model, processor, questions, tmp_path) -> None:
    board = Image.new("RGB", (24, 24), "white")
    board.paste(Image.new("RGB", (12, 12)), (0, 0))
    board.save(tmp_path / "board.png")
    asked = [questions[0], Question("what", "", 9, str(tmp_path / "board.png")), questions[1]]
    spent: list[int] = []
    together = answer_questions(tiny_model, processor, asked, "auto", batch_size=2, on_budgets=spent.extend)
    assert spent == [1, 4, 1]
    assert together == [answer_questions(tiny_model, processor, [q], n)[0] for q, n in zip(asked, spent)]
    spent.clear()
    answer_questions(tiny_model, processor, asked, "auto", auto_max_loss=1, on_budgets=spent.extend)
    answer_questions(tiny_model, processor, asked, on_budgets=spent.extend)
    assert spent == [1, 1, 1, 36, 36, 36]


def test_a_question_longer_than_the_models_positions_is_refused(tiny_model, processor, questions, monkeypatch):
    monkeypatch.setattr(tiny_model.config.text_config, "max_position_embeddings", 180)
    with pytest.raises(ValueError, match="The prompt is too long: it has 2.. tokens, and the model has 180 positions"):
        answer_questions(tiny_model, processor, questions[:1])
    with pytest.raises(ValueError, match="The prompt is too long: it has more than 180 tokens"):
        answer_questions(tiny_model, processor, [questions[0]._replace(text="a" * 10**6)])
