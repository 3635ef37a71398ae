import builtins
import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.cli.main import app
from transformers_delta_llava.evaluation import (
    Question,
    answer_questions,
    draw_test_questions,
    load_questions,
    majority_answers,
    score_answers,
)


@pytest.fixture(scope="module")
def model() -> DeltaLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(tiny_config()).eval()


@pytest.fixture(scope="module")
def processor(model):
    return tiny_processor(model.config)


@pytest.fixture(scope="module")
def saved(model, processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


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
def test_batched_answers_are_those_of_single_questions(model, processor, questions, budget) -> None:
    counts = []
    together = answer_questions(model, processor, questions, budget, batch_size=3, on_batch=counts.append)
    alone = [answer_questions(model, processor, [question], budget)[0] for question in questions]
    assert together == alone
    assert counts == [3, 2]
    assert all(together)  # the comparison would hold of nothing at all


def test_the_budget_reaches_the_projector(model, processor, questions) -> None:
    shapes = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda _, __, out: shapes.append(out.shape[:2]))
    answer_questions(model, processor, questions, 9, batch_size=5)
    hook.remove()
    assert shapes == [(5, 9)]


def test_command_prints_and_writes_the_numbers(saved, tmp_path) -> None:
    arguments = ["evaluate", "easy-vqa", saved, "--limit", "6", "--num-visual-tokens", "4"]
    arguments += ["--num-visual-tokens", "1", "--output", str(tmp_path / "numbers.json")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}, catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads((tmp_path / "numbers.json").read_text())
    assert (report["questions"], report["model"]) == (6, "model")
    assert [entry["num_visual_tokens"] for entry in report["results"]] == [4, 1]
    assert report["results"][0]["scores"]["overall"]["accuracy"] == 0.0  # random weights: no word is an answer
    alone = report["question_alone"]["overall"]
    assert f"{alone['accuracy']:.2f} ({alone['interval_95'][0]:.2f} to" in result.stdout
    assert "4 visual tokens" in result.stdout and "1 visual tokens" in result.stdout


def test_auto_picks_image_by_image(model, processor, questions, tmp_path) -> None:
    board = Image.new("RGB", (24, 24), "white")
    board.paste(Image.new("RGB", (12, 12)), (0, 0))
    board.save(tmp_path / "board.png")
    asked = [questions[0], Question("what", "", 9, str(tmp_path / "board.png")), questions[1]]
    spent: list[int] = []
    together = answer_questions(model, processor, asked, "auto", batch_size=2, on_budgets=spent.extend)
    assert spent == [1, 4, 1]
    assert together == [answer_questions(model, processor, [q], n)[0] for q, n in zip(asked, spent)]
    spent.clear()
    answer_questions(model, processor, asked, "auto", auto_max_loss=1, on_budgets=spent.extend)
    answer_questions(model, processor, asked, on_budgets=spent.extend)
    assert spent == [1, 1, 1, 36, 36, 36]


def test_command_measures_auto(saved, tmp_path) -> None:
    arguments = ["evaluate", "easy-vqa", saved, "--limit", "4", "--num-visual-tokens", "auto"]
    arguments += ["--auto-max-loss", "0.5", "--auto-max-loss", "1", "--output", str(tmp_path / "numbers.json")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "140"}, catch_exceptions=False)
    assert result.exit_code == 0
    half, all_of_it = json.loads((tmp_path / "numbers.json").read_text())["results"]
    assert (half["num_visual_tokens"], half["auto_max_loss"]) == ("auto", 0.5)
    assert sum(half["picked"].values()) == 4
    assert half["mean_visual_tokens"] == sum(int(n) * times for n, times in half["picked"].items()) / 4 > 1
    assert (all_of_it["mean_visual_tokens"], all_of_it["picked"]) == (1, {"1": 4})
    assert "auto, loss up to 0.5" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-visual-tokens", "5"], "--num-visual-tokens 5: the model has 144, 36, 16, 9, 4, 1, or say auto."),
        (["--num-visual-tokens", "many"], "--num-visual-tokens many: the model has"),
        (["--num-visual-tokens", "auto", "--auto-max-loss", "2"], "--auto-max-loss 2.0: give a share from 0 to 1."),
        (["--auto-max-loss", "0.2"], "--auto-max-loss goes with --num-visual-tokens auto."),
    ],
)
def test_bad_choices_are_refused_before_anything_runs(saved, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["evaluate", "easy-vqa", saved, "--limit", "4", *options], catch_exceptions=False)


def test_a_question_longer_than_the_models_positions_is_refused(model, processor, questions, monkeypatch):
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 180)
    with pytest.raises(ValueError, match="The prompt is too long: it has 2.. tokens, and the model has 180 positions"):
        answer_questions(model, processor, questions[:1])
    with pytest.raises(ValueError, match="The prompt is too long: it has more than 180 tokens"):
        answer_questions(model, processor, [questions[0]._replace(text="a" * 10**6)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "dtype='int8': use one of"),
        (["--device", "abacus"], "device='abacus' is not to be had here"),
        (["--batch-size", "0"], "--batch-size 0: ask at least one"),
        (["--limit", "0"], "limit=0: ask at least one"),
        (["--output", "no/such/folder/x.json"], "name a file in a folder that exists"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(saved, options, message):
    error = CliRunner().invoke(app, ["evaluate", "easy-vqa", saved, *options]).exception
    assert isinstance(error, ValueError) and message in str(error)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    for command in (["evaluate", "easy-vqa"], ["profile"]):
        error = CliRunner().invoke(app, [*command, str(tmp_path)]).exception
        assert isinstance(error, ValueError) and "is a llava, not a delta_llava" in str(error)
