"""Answers for images and JSONL files: each question once, the same as one at a time, whatever is killed or broken."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.tiny import noise
from transformers_delta_llava import generate as generation
from transformers_delta_llava.generate import (
    AnswerFile,
    Request,
    ask,
    compare,
    generate,
    read_requests,
    wilson_interval,
)
from transformers_delta_llava.loading import answer_ids, encode_question, load_repo


@pytest.fixture(scope="module")
def trained(easy_vqa_repo: Path) -> tuple[Any, Any]:
    return load_repo(easy_vqa_repo, "cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(6):
        noise(40 + 8 * index, 64, seed=index).save(folder / f"{index}.png")
    return folder


def one_by_one(trained: tuple[Any, Any], requests: list[Request]) -> dict[str, str]:
    model, processor = trained
    texts = {}
    for request in requests:
        picture, prompt = Image.open(request.images()[0]).convert("RGB"), request.messages[0]["content"][-1]["text"]
        options = {"num_visual_tokens": request.num_visual_tokens, "max_tiles": request.max_tiles}
        inputs = encode_question(processor, picture, prompt, **options)
        ids = answer_ids(model, inputs, request.max_new_tokens)
        texts[request.key] = processor.decode(ids, skip_special_tokens=True).strip()
    return texts


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_answer_as_single_questions_do(trained, images, workers):
    requests = [
        Request(f"{index}-{question}", ask(question, str(images / f"{index}.png")), number, max_new_tokens=4)
        for index in range(6)
        for question in ("what color is the shape?", "is there a red circle?")
        for number in (16, 1)
    ]
    towers = []
    hook = trained[0].model.vision_tower.register_forward_hook(lambda *_: towers.append(1))
    counts: list[int] = []
    layers = trained[0].model.vision_tower.encoder.layers[0]
    counting = layers.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    answers = [a for batch, _ in generate(*trained, requests, batch_size=5, num_workers=workers) for a in batch]
    hook.remove()
    counting.remove()
    assert sum(counts) == 6  # the tower runs once per image
    assert {answer.request.key: answer.text for answer in answers} == one_by_one(trained, requests)
    assert {answer.visual_tokens for answer in answers} == {16, 1}


def test_tiles_per_row(trained, images, tmp_path):
    noise(150, 60).save(tmp_path / "wide.png")
    rows = [{"image": str(tmp_path / "wide.png"), "prompt": "what color?", "max_tiles": n} for n in (1, 4, 2, 4)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"id": f"{i}", **row}) + "\n" for i, row in enumerate(rows))
    )
    requests = read_requests(str(tmp_path / "rows.jsonl"), max_new_tokens=4)
    answers = [a for batch, _ in generate(*trained, requests, batch_size=3) for a in batch]
    assert {answer.request.id: answer.visual_tokens for answer in answers} == {"0": 16, "1": 64, "2": 48, "3": 64}
    assert {answer.request.key: answer.text for answer in answers} == one_by_one(trained, requests)


def test_features_are_kept_while_a_window_needs_them(trained, images, monkeypatch):
    """Not those of an image that nobody asks about any more, or much later, or only in a request that fails."""
    monkeypatch.setattr(generation, "WINDOW", 2)
    names = [str(images / f"{index}.png") for index in (0, 0, 1, 1, 0, 2)]
    requests = [
        Request(str(index), ask("is there a circle?", name), max_new_tokens=1) for index, name in enumerate(names)
    ]
    requests.append(Request("failed", ask("what?", names[0]), error="not a question"))
    kept = []
    forget = generation._Features.forget_others
    monkeypatch.setattr(
        generation._Features, "forget_others", lambda self, names: (forget(self, names), kept.append([*self.kept]))
    )
    for _ in generate(*trained, requests, batch_size=1):
        pass
    assert kept == [[names[0]], [], [names[2]], [], [], [], []]


def test_input_is_an_image_a_folder_a_glob_or_jsonl(images, tmp_path):
    assert [r.id for r in read_requests(str(images), "what?")] == [f"{index}.png" for index in range(6)]
    assert len(read_requests(str(images / "[0-2].png"), "what?")) == 3
    (single,) = read_requests(str(images / "1.png"), "what?")
    assert single.images() == [str(images / "1.png")]
    batch = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "max_tokens": 3,
            "temperature": 0,
            "mm_processor_kwargs": {"num_visual_tokens": 4},
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "http://host/x.png"}},
                        {"type": "text", "text": "what?"},
                    ],
                }
            ],
        },
    }
    hot = {**batch, "custom_id": "hot", "body": {**batch["body"], "temperature": 1}}
    tools = {**batch, "custom_id": "tools", "body": {**batch["body"], "tools": [1]}}
    rows = [
        {"id": 1, "image": "1.png", "prompt": "what?", "num_visual_tokens": "auto", "answer": "cat"},
        {"images": ["1.png", "https://host/2.png"], "prompt": "what?", "answer": ["a", "b"]},
        {"prompt": "words only"},
        {"image": "1.png"},
        batch,
        hot,
        tools,
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    read = read_requests(str(tmp_path / "rows.jsonl"), max_new_tokens=9)
    assert [(r.id, r.num_visual_tokens, r.answer, r.error is None) for r in read] == [
        ("1", "auto", ("cat",), True),
        ("1", None, ("a", "b"), True),
        ("2", None, (), True),
        ("3", None, (), False),
        ("a", 4, (), True),
        ("hot", None, (), False),
        ("tools", None, (), False),
        ("7", None, (), False),
    ]
    assert read[0].images() == [str(tmp_path / "1.png")]
    assert read[1].images() == [str(tmp_path / "1.png"), "https://host/2.png"]
    assert read[4].images() == ["http://host/x.png"] and read[4].max_new_tokens == 3 and read[2].max_new_tokens == 9


@pytest.mark.parametrize("batch_format", [False, True])
def test_a_killed_run_goes_on(trained, images, tmp_path, batch_format):
    requests = [
        Request(str(index), ask(question, str(images / f"{index % 6}.png")), max_new_tokens=4)
        for index, question in enumerate(
            ["what color is the shape?", "is there a circle?", "what shape is in the image?"] * 6
        )
    ]
    whole = AnswerFile(tmp_path / "whole.jsonl", batch_format)
    for batch, _ in generate(*trained, requests, batch_size=4):
        whole.append(batch)
    data = whole.path.read_bytes()
    killed = AnswerFile(tmp_path / "killed.jsonl", batch_format)
    for cut in (0, 1, len(data) // 3, len(data) - 1):
        killed.path.write_bytes(data[:cut])
        done = killed.read()
        for batch, _ in generate(*trained, requests, batch_size=4, done=set(done)):
            killed.append(batch)
        assert sorted(killed.path.read_bytes().splitlines()) == sorted(data.splitlines())


def test_what_is_broken_is_a_row_with_an_error(call, easy_vqa_repo, images, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    rows = [
        {"id": "good", "image": str(images / "1.png"), "prompt": "what shape?"},
        {"id": "broken", "image": "broken.png", "prompt": "what shape?"},
        {"id": "missing", "image": "missing.png", "prompt": "what shape?"},
        {"id": "budget", "image": str(images / "1.png"), "prompt": "what shape?", "num_visual_tokens": 7},
        {"id": "row"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):  # what failed is not asked again
        code, out, err = call(
            "generate", easy_vqa_repo, tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--device", "cpu"
        )
        answers = {row["id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
        assert code == 1 and out.strip() == str(tmp_path / "out.jsonl") and "4 of 5" in err
        assert answers.keys() == {row["id"] for row in rows} and answers["good"]["text"]
        assert [name for name, row in answers.items() if "error" not in row] == ["good"]
        assert "7" in answers["budget"]["error"]


def test_one_image_is_answered_on_stdout(call, easy_vqa_repo, images):
    code, out, _ = call(
        "generate", easy_vqa_repo, images / "1.png", "--prompt", "what shape is in the image?", "--device", "cpu"
    )
    assert code == 0 and len(out.splitlines()) == 1 and out == out.lstrip()
    assert call("generate", easy_vqa_repo, images / "1.png")[0] == 2  # no prompt
    assert call("generate", easy_vqa_repo, images, "--prompt", "what?")[0] == 2  # no output


def test_budgets_are_compared_where_answers_are_known(call, easy_vqa_repo, images, tmp_path):
    rows = [
        {"image": str(images / f"{index}.png"), "prompt": "is there a shape?", "answer": ["Yes.", "no"]}
        for index in range(4)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = (
        "generate",
        easy_vqa_repo,
        tmp_path / "in.jsonl",
        "--num-visual-tokens",
        16,
        4,
        1,
        "--device",
        "cpu",
        "--json",
    )
    code, out, _ = call(*arguments)
    table = json.loads(out)
    assert code == 0 and [(row["num_visual_tokens"], row["visual_tokens"]) for row in table] == [
        ("16", 16),
        ("4", 4),
        ("1", 1),
    ]
    assert all(row["questions"] == 4 and row["accuracy"] == 100 and row["seconds"] > 0 for row in table)
    shards = []
    for shard in ("0/3", "1/3", "2/3"):
        call(*arguments, "--shard", shard, "--output", tmp_path / f"{shard[0]}.jsonl")
        shards += (tmp_path / f"{shard[0]}.jsonl").read_text().splitlines()
    assert len(shards) == 12 and len({(row["id"], row["num_visual_tokens"]) for row in map(json.loads, shards)}) == 12


def test_wilson_interval():
    for correct, total, expected in (
        (0, 0, (0, 1)),
        (0, 10, (0, 0.2775)),
        (5, 10, (0.2366, 0.7634)),
        (10, 10, (0.7225, 1)),
    ):
        assert wilson_interval(correct, total) == pytest.approx(expected, abs=1e-4)
    assert compare([Request("a")], {}) == []
