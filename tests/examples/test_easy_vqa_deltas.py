"""The recipe that trains deltas on the shipped model, and the deltas that it made."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.easy_vqa_data import swap_red_and_blue
from examples.easy_vqa_data import write_rows as write_questions
from examples.easy_vqa_questions import answer_questions, draw_test_questions, load_questions, score_answers
from tests.training.tiny_run import write_data
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.deltas import extract, merge
from transformers_delta_llava.training import load_recipe, make_trainer, train


EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = EXAMPLES / "recipes" / "easy-vqa-deltas.yaml"
DELTAS = EXAMPLES / "easy-vqa-deltas"


@pytest.fixture(scope="module")
def base(easy_vqa_repo: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deltas") / "base"
    merge(easy_vqa_repo, folder, rank=3)
    return folder


def recipe_for(base: Path, tmp_path: Path, *changes: str):
    write_data(tmp_path / "data", 8)
    data = [f"data.path={tmp_path / 'data' / 'rows.json'}", f"data.images={tmp_path / 'data'}"]
    run = [f"arguments.output_dir={tmp_path / 'out'}", "arguments.max_steps=2"]
    return load_recipe(
        RECIPE, [f"model.path={base}", *data, *run, "arguments.per_device_train_batch_size=2", *changes]
    )


def test_the_recipe_trains_less_than_two_percent_of_the_projector(base, tmp_path):
    trainer = make_trainer(recipe_for(base, tmp_path))
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 6 and all(".delta_" in name for name in trained)
    projector = sum(p.numel() for p in trainer.model.model.multi_modal_projector.parameters())
    numbers = sum(t.numel() for t in trainer.model.delta_state_dict().values())
    assert (numbers, numbers / projector < 0.02) == (2304, True)
    optimizer = trainer.create_optimizer()
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == numbers


def test_what_the_recipe_trains_goes_onto_the_base(base, tmp_path):
    out = train(recipe_for(base, tmp_path))
    extract(out, tmp_path / "deltas")
    before, after = (DeltaLlavaForConditionalGeneration.from_pretrained(path) for path in (base, out))
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]) != name.endswith(".delta_v"), name  # u waits for v
    before.load_deltas(tmp_path / "deltas")
    assert all(torch.equal(t, before.state_dict()[name]) for name, t in after.state_dict().items())


def test_shipped_deltas_are_worth_what_their_card_says(base, tmp_path):
    """100 questions on one model, which swaps its deltas and keeps its answers on other images."""
    questions = draw_test_questions(100)
    swapped = []
    for question in questions:
        path = tmp_path / f"{question.image_id}.png"
        with Image.open(question.image) as file:
            swap_red_and_blue(file.convert("RGB")).save(path)
        swapped.append(question._replace(image=str(path)))
    model = DeltaLlavaForConditionalGeneration.from_pretrained(base)
    processor = DeltaLlavaProcessor.from_pretrained(base)
    model.load_deltas(DELTAS, name="swapped", activate=False)

    def percent(asked) -> float:
        return score_answers([q.answer for q in asked], answer_questions(model, processor, asked))["overall"].accuracy

    assert percent(questions) > 97 and percent(swapped) < 90
    model.set_deltas("swapped")
    assert percent(swapped) > 97
    measured = json.loads((DELTAS / "results.json").read_text())
    assert (
        measured["numbers"] == 2304 and measured["share"] < 0.02 and measured["results"][3]["overall"]["accuracy"] > 97
    )


def test_images_are_swapped_and_answers_stay(tmp_path):
    questions = [question for question in load_questions("train") if question.image_id in (0, 1)]
    for folder, change in (("plain", None), ("swapped", swap_red_and_blue)):
        write_questions(tmp_path / folder, questions, 2, 5, random.Random(0), change)
    plain, swapped = ((tmp_path / folder / "train.json").read_bytes() for folder in ("plain", "swapped"))
    assert plain == swapped
    for file in (tmp_path / "plain" / "images").iterdir():
        with Image.open(file) as one, Image.open(tmp_path / "swapped" / "images" / file.name) as other:
            assert one.tobytes() != other.tobytes()
            assert one.tobytes() == swap_red_and_blue(other).tobytes()
