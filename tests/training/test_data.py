"""Rows become messages; what cannot be used is counted, named, and skipped or fatal as the recipe says."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import make_image, make_rows, write_data, write_rows
from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.training import DataRecipe
from transformers_delta_llava.training.data import open_rows, to_messages


def turn(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def test_images_of_a_turn_come_before_its_text() -> None:
    turns = [turn("human", "Compare <image> with <image>."), turn("gpt", "Alike."), turn("human", "This?\n<image>")]
    row = {"image": ["a.png", "b.png", "c.png"], "conversations": [*turns, turn("gpt", "Not.")]}
    messages = to_messages(row)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    parts = [[part.get("image", part.get("text")) for part in message["content"]] for message in messages]
    assert parts[0] == ["a.png", "b.png", "Compare  with ."] and parts[2] == ["c.png", "This?"]


def test_an_answer_to_nothing_is_dropped() -> None:
    row = {"conversations": [turn("gpt", "Hello!"), turn("human", "Hi"), turn("gpt", "Yes?")]}
    assert [message["content"][0]["text"] for message in to_messages(row)] == ["Hi", "Yes?"]


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_the_system_text_of_a_row_opens_its_conversation(key: str) -> None:
    messages = to_messages({"system": "Be brief.", key: [turn("human", "Hi"), turn("gpt", "Yes?")]})
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == [{"type": "text", "text": "Be brief."}]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"conversations": [turn("human", "Hi")]},
        {"conversations": [turn("gpt", "Hi")]},
        {"conversations": [turn("human", "Hi"), turn("gpt", " ")]},
        {"conversations": [turn("human", "Hi"), turn("human", "Ho"), turn("gpt", "x")]},
        {"conversations": [turn("human", "Hi"), turn("bing", "x")]},
        {"conversations": [turn("human", "Hi"), turn("gpt", "<image>")]},
        {"conversations": [turn("human", "Hi"), turn("gpt", None)]},
        {"tools": ["x"], "conversations": [turn("human", "Hi"), turn("gpt", "x")]},
        {"conversations": [turn("human", "<image> Hi"), turn("gpt", "x")]},
        {"image": "a.png", "conversations": [turn("human", "Hi"), turn("gpt", "x")]},
        {"image": ["a", "b"], "conversations": [turn("human", "<image>"), turn("gpt", "x")]},
        [1],
    ],
    ids=str,
)
def test_a_row_that_cannot_be_used_is_left_out_by_name(row: Any, tmp_path: Path) -> None:
    good = {"conversations": [turn("human", "Hi"), turn("gpt", "x")]}
    file = write_rows(tmp_path / "rows.jsonl", [good, row, good])
    rows = open_rows(DataRecipe(path=str(file), on_error="skip"))
    assert rows.numbers.tolist() == [0, 2] and [name for name, _ in rows.bad] == ["row 1"]
    with pytest.raises(DeltaLlavaError, match="row 1"):
        open_rows(DataRecipe(path=str(file)))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_are_read_from_the_file(tmp_path: Path, suffix: str) -> None:
    file = write_data(tmp_path / "data", 8, suffix)
    rows = open_rows(DataRecipe(path=str(file), images=str(tmp_path / "data")))
    assert [rows.source[row] for row in range(8)] == make_rows(8)
    assert rows.images.tolist() == [1, 1, 1, 0] * 2
    assert rows.messages(1)[0]["content"][0]["image"] == str(tmp_path / "data" / "1.png")
    assert rows.name(5) == "row 5 (id r5)"


def test_images_are_looked_for_at_every_start(tmp_path: Path) -> None:
    file = write_data(tmp_path / "data", 4)
    (tmp_path / "data" / "2.png").rename(tmp_path / "2.png")
    recipe = DataRecipe(path=str(file), images=str(tmp_path / "data"), on_error="skip")
    assert open_rows(recipe).bad[0][0] == "row 2 (id r2)"
    (tmp_path / "2.png").rename(tmp_path / "data" / "2.png")
    assert not open_rows(recipe).bad


def test_captions_only_for_the_plain_template(tmp_path: Path) -> None:
    file = write_data(tmp_path / "data", 4)
    recipe = DataRecipe(path=str(file), images=str(tmp_path / "data"), chat_template="plain", on_error="skip")
    assert open_rows(recipe).bad[0][0] == "row 3 (id r3)"  # the one without an image


def test_datasets_with_messages_and_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image, text = {"type": "image", "text": None}, {"type": "text", "text": "What?"}
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    rows = {
        "messages": [
            [{"role": "user", "content": [image, text]}, *answer],
            [{"role": "user", "content": [text]}, *answer],
            [{"role": "user", "content": [image, image, text]}, *answer],
            [{"role": "user", "content": [text]}],
        ],
        "images": [[make_image(0)], [], [make_image(1), make_image(2)], []],
    }
    features = datasets.Features(
        messages=datasets.List(
            {
                "role": datasets.Value("string"),
                "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
            }
        ),
        images=datasets.List(datasets.Image()),
    )
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "saved")
    opened = open_rows(DataRecipe(dataset=str(tmp_path / "saved"), on_error="skip"))
    assert opened.images.tolist() == [1, 0, 2] and [name for name, _ in opened.bad] == ["row 3"]
    content = opened.messages(2)[0]["content"]
    assert [item["type"] for item in content] == ["image", "image", "text"]
    assert content[1]["image"].getpixel((3, 3)) == make_image(2).getpixel((3, 3))
    assert json.dumps(opened.lengths.tolist()) == "[11, 11, 11]"
