"""The training data made of easy-VQA: what is written, and that moving a shape changes nothing else."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from examples.easy_vqa_data import captions, move_shape, write_rows, write_tokenizer
from examples.easy_vqa_questions import load_questions
from transformers_delta_llava.processing.chat_templates import CONVERSATIONS


def scene(box: tuple[int, int, int, int], colour=(200, 0, 0)) -> Image.Image:
    image = Image.new("RGB", (64, 64), (240, 245, 250))
    left, top, right, bottom = box
    for x in range(left, right):  # a right-angled triangle: not its own mirror image
        image.paste(colour, (x, top + (x - left) * (bottom - top) // (right - left), x + 1, bottom))
    return image


@pytest.mark.parametrize("box", [(10, 20, 30, 40), (0, 0, 20, 12), (44, 50, 64, 64)])
def test_a_moved_shape_is_whole_and_nothing_else_changes(box):
    original, rng = scene(box), random.Random(0)
    colours = Counter(map(tuple, np.asarray(original).reshape(-1, 3).tolist()))
    places, mirrored = set(), 0
    for _ in range(20):
        moved = move_shape(original, rng)
        assert (
            Counter(map(tuple, np.asarray(moved).reshape(-1, 3).tolist())) == colours
        )  # as many pixels of the shape, as many of the ground
        ys, xs = np.nonzero((np.asarray(moved) != (240, 245, 250)).any(-1))
        places.add((xs.min(), ys.min()))
        shape = np.asarray(moved)[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        before = np.asarray(original.crop(box))[-shape.shape[0] :]
        same, flipped = np.array_equal(shape, before), np.array_equal(shape, before[:, ::-1])
        assert same or flipped
        mirrored += flipped
    assert len(places) > 10 and 3 < mirrored < 17


def test_an_image_of_ground_alone_stays_as_it_is():
    plain = Image.new("RGB", (64, 64), "white")
    assert np.array_equal(move_shape(plain, random.Random(0)), plain)


def test_every_version_of_an_image_asks_each_of_its_questions_once(tmp_path):
    questions = [question for question in load_questions("train") if question.image_id in (0, 1, 5)]
    count = write_rows(tmp_path, questions, versions=3, per_row=4, rng=random.Random(0))
    rows = json.loads((tmp_path / "train.json").read_text())
    assert len(rows) == count and len({row["id"] for row in rows}) == count
    asked: Counter = Counter()
    for row in rows:
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) and len(turns) <= 8
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
        for human, gpt in zip(turns[::2], turns[1::2]):
            asked[row["image"], human["value"].removeprefix("<image>\n"), gpt["value"]] += 1
    expected = Counter((f"{q.image_id}-{version}.png", q.text, q.answer) for q in questions for version in range(3))
    assert asked == expected
    original = Image.open(next(q.image for q in questions if q.image_id == 5)).convert("RGB")
    assert np.array_equal(Image.open(tmp_path / "images" / "5-0.png"), original)


def test_captions_contradict_no_question():
    """Colour and shape follow from some questions; every other question on the image must agree."""
    questions = load_questions("train")
    known = captions(questions)
    assert len(known) == 3381  # of 4,000 images
    words = {word for caption in known.values() for word in caption.split()[1:]}
    assert len(words) == 11
    for question in questions:
        if question.image_id not in known:
            continue
        truth = set(known[question.image_id].split())
        asked = question.text.rstrip("?").split()
        if question.answer in ("yes", "no"):
            denied = bool({"no", "not"} & set(asked))
            assert ((words & set(asked) <= truth) != denied) == (question.answer == "yes"), question
        else:
            assert question.answer in truth, question


def test_the_tokenizer_reads_prompts_without_loss_and_answers_in_one_token(tmp_path):
    questions = list({(q.text, q.answer): q for q in load_questions("train")}.values())
    size = write_tokenizer(tmp_path, questions)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert size == len(tokenizer) < 512
    for answer in {question.answer for question in questions}:
        assert len(tokenizer.encode(f" {answer}", add_special_tokens=False)) == 1
    prompt = CONVERSATIONS["vicuna_v1"].default_system + " USER: é?"
    ids = tokenizer.encode(prompt)
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(ids[1:]) == prompt  # whatever the bytes
    assert len(ids) < 45  # the words of the system message are tokens
