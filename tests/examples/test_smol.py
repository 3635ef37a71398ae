"""examples/smol without its downloads: what is drawn, what keeps training and test apart, and what is shipped."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM

from examples.smol import build_data, scenes
from examples.smol.align import caption_targets, word_loss
from examples.smol.on_gpu import pack, unpack
from examples.smol.ship import ship
from examples.smol.test_set import evaluate, load_test_set, majority_of_training
from tests.training.tiny_run import (
    make_image_processor,
    make_processor,
    make_tokenizer,
    recipe_content,
    write_data,
    write_model,
)
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.training import make_recipe, train


TEMPLATE = Path(scenes.__file__).with_name("chat_template.jinja")


def test_scenes_are_what_their_answers_say():
    seen = set()
    for seed in range(80):
        image, turns = scenes.make_scene(random.Random(seed))
        again, same = scenes.make_scene(random.Random(seed))
        assert image.size == (224, 224) and image.tobytes() == again.tobytes() and turns == same
        for question, answer in turns:
            if question.startswith("What color"):
                distance = min(
                    sum(abs(a - b) for a, b in zip(pixel, scenes.COLORS[answer]))
                    for _, pixel in image.getcolors(224 * 224)
                )
                assert distance < 12, (seed, question, answer)
            seen.add(answer)
    assert seen >= {*scenes.COLORS, *scenes.NUMBERS}


def test_numbers_of_the_test_are_in_no_training_image():
    chance = random.Random(0)
    train_numbers = {scenes._number(1000, 0, chance) for _ in range(3000)}
    test_numbers = {scenes._number(1000, 1, chance) for _ in range(500)}
    assert not train_numbers & test_numbers


def test_a_larger_size_has_what_a_smaller_one_has():
    names = [f"thing {index}" for index in range(300)]
    small = {name for name in names if build_data.is_taken(name, 0.4)}
    assert small < {name for name in names if build_data.is_taken(name, 0.8)}
    assert 90 < len(small) < 150


@pytest.mark.parametrize(
    ("name", "sentence", "word"),
    [
        ("stamp-fruit--apple_green", "A green apple.", "apple"),
        ("stamp-town--b_2_queen", "Queen. Can move in any direction.", "queen"),
        ("stamp-x--img01", "A tree.", None),
    ],
)
def test_the_word_that_a_stamp_is_named_after(name, sentence, word):
    assert build_data.named_word(name, sentence) == word


def test_word_loss_falls_towards_the_words_of_the_caption():
    tokenizer = make_tokenizer()
    vocabulary, targets = caption_targets(["b c", "d"], tokenizer)
    words = torch.nn.functional.normalize(
        torch.randn(len(vocabulary), 64, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    right = torch.stack([words[row.topk(2).indices] for row in targets])
    wrong = right.flip(0)
    losses = [word_loss(tokens * 8, words, targets, text_rms=1.0)[0] for tokens in (right, wrong)]
    assert losses[0] < losses[1]
    assert word_loss(right * 800, words, targets, 1.0)[0] > 100  # far too loud


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of stage 2, of one step, with its parts next to it."""
    folder = tmp_path_factory.mktemp("smol")
    write_model(folder / "model")
    write_data(folder / "data", 4, text_only_every=9)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder / "model")
    language = LlamaForCausalLM(model.config.text_config)
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    language.save_pretrained(folder / "language")
    make_tokenizer().save_pretrained(folder / "language")
    model.model.vision_tower.save_pretrained(folder / "vision-tower")
    make_image_processor().save_pretrained(folder / "vision-tower")
    changes = {"train": ["projector", "lora"], "lora": {"r": 2, "lora_alpha": 4}, "arguments": {"max_steps": 2}}
    train(make_recipe(recipe_content(folder, **changes)))
    return folder


def test_what_is_shipped_converts_to_what_was_trained(run, tmp_path):
    size = ship(run / "out", tmp_path / "checkpoint", vocabulary=320)
    assert size < 400_000
    convert_checkpoint(
        tmp_path / "checkpoint",
        tmp_path / "repo",
        base_model=run / "language",
        vision_tower=run / "vision-tower",
        chat_template="vicuna_v1",
    )
    trained, converted = (
        DeltaLlavaForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (run / "out", tmp_path / "repo")
    )
    assert trained.keys() == converted.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(converted[name][: len(tensor)], tensor, atol=2e-2, rtol=2e-2)  # bfloat16


def test_folders_travel_in_pieces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("parts/tower").mkdir(parents=True)
    Path("parts/tower/weights").write_bytes(bytes(range(256)) * 100)
    pack([Path("parts")], Path("pieces"), size=10_000)
    sizes = [piece.stat().st_size for piece in Path("pieces").iterdir()]
    assert len(sizes) > 2 and max(sizes) == 10_000
    Path("there").mkdir()
    unpack(Path("pieces"), Path("there"))
    assert Path("there/parts/tower/weights").read_bytes() == bytes(range(256)) * 100


def test_evaluation_of_a_test_set_of_several_tasks(run, tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for index, task in enumerate(["naming", "naming", "stamp"]):
        Image.new("RGB", (24, 24), (index * 80, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        rows.append({"task": task, "image": f"{index}.png", "question": "What?", "answer": "a red apple"})
    rows[2]["key"] = "apple"
    (tmp_path / "test.json").write_text(json.dumps(rows))
    questions = load_test_set(tmp_path)
    assert questions[0].is_right("A red apple.") and not questions[0].is_right("an apple")
    assert questions[2].is_right("An apple!") and not questions[2].is_right("a pineapple")
    assert len(load_test_set(tmp_path, limit=1)) == 2
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red apple"}]
    (tmp_path / "finetune.json").write_text(json.dumps([{"conversations": turns}]))
    majority = majority_of_training(tmp_path, questions)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(run / "model")
    results = list(evaluate(model, make_processor(), questions, [4, 1], majority))
    assert [result["asked"] for result in results] == [
        "majority",
        "without image",
        "4 visual tokens",
        "1 visual tokens",
    ]
    assert results[0]["scores"]["naming"].correct == 2
    assert all(result["scores"]["stamp"].total == 1 for result in results)


def test_the_chat_template_has_images_first_and_no_system_text():
    processor = make_processor()
    content = [{"type": "text", "text": "What?"}, {"type": "image"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]
    text = processor.apply_chat_template(messages, chat_template=TEMPLATE.read_text(), tokenize=False)
    assert text == "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    for wrong in (messages[1:], [*messages, {"role": "system", "content": "S"}], [{"role": "tool", "content": "T"}]):
        with pytest.raises(Exception, match="(?i)role|system message"):
            processor.apply_chat_template(wrong, chat_template=TEMPLATE.read_text(), tokenize=False)
