"""Data is read row by row; what cannot be used is counted, named, and skipped or fatal as the recipe says."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import make_image, make_rows, write_data, write_rows
from transformers_delta_llava.training import DataError, DataRecipe, row_index
from transformers_delta_llava.training.conversations import to_messages
from transformers_delta_llava.training.dataset import DatasetRows, JsonRows, open_rows
from transformers_delta_llava.utils.errors import RowError


def turn(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def test_images_of_a_turn_come_before_its_text() -> None:
    row = {
        "image": ["a.png", "b.png", "c.png"],
        "conversations": [
            turn("human", "Compare <image> with <image>."),
            turn("gpt", "Alike."),
            turn("human", "And this?\n<image>"),
            turn("gpt", "Not."),
        ],
    }
    messages = to_messages(row)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert [item.get("image", item.get("text")) for item in messages[0]["content"]] == [
        "a.png",
        "b.png",
        "Compare  with .",
    ]
    assert [item.get("image", item.get("text")) for item in messages[2]["content"]] == ["c.png", "And this?"]


def test_an_answer_to_nothing_is_dropped() -> None:
    row = {"conversations": [turn("gpt", "Hello!"), turn("human", "Hi"), turn("gpt", "Yes?")]}
    assert [message["content"][0]["text"] for message in to_messages(row)] == ["Hi", "Yes?"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "of type list"),
        ({}, "no conversation"),
        ({"conversations": [turn("human", "Hi")]}, "no answer"),
        ({"conversations": [turn("gpt", "Hi")]}, "no answer"),
        ({"conversations": [turn("human", "Hi"), turn("gpt", " ")]}, "empty answer"),
        (
            {"conversations": [turn("human", "Hi"), turn("human", "Ho"), turn("gpt", "x")]},
            "turn 2 is from the user instead of the assistant",
        ),
        (
            {"conversations": [turn("human", "Hi"), turn("bing", "x")]},
            r"conversations\.1\.from='bing': input should be 'human'",
        ),
        ({"conversations": [turn("human", "Hi"), turn("gpt", None)]}, r"conversations\.1\.value.*=None: input"),
        ({"conversations": [turn("human", "Hi"), turn("gpt", "<image>")]}, "<image> in a turn of the assistant"),
        ({"conversations": ["Hi"]}, r"conversations\.0='Hi': input should be a valid dictionary"),
        ({"conversations": "Hi"}, r"conversations='Hi': input should be a valid list"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, r"role=\['user'\]: input should be 'human'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content.*text is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, r"content.*'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]}, r"image\.url='a\.png'"),
        ({"conversations": [turn("human", "\ud83d"), turn("gpt", "x")]}, "half a character"),
        ({"system": 3, "conversations": [turn("human", "Hi"), turn("gpt", "x")]}, "system=3"),
        (
            {"system": "A", "conversations": [turn("system", "B"), turn("human", "Hi"), turn("gpt", "x")]},
            "and a system",
        ),
        ({"tools": ["x"], "conversations": [turn("human", "Hi"), turn("gpt", "x")]}, "it has tools"),
        ({"video": "a.mp4", "conversations": [turn("human", "<video>"), turn("gpt", "x")]}, "it has video"),
        ({"image": "a", "images": ["a"], "conversations": [turn("human", "<image>"), turn("gpt", "x")]}, "both image"),
        ({"conversations": [turn("human", "a")], "messages": [turn("human", "a")]}, "both conversations and messages"),
        ({"conversations": [turn("human", "<image> Hi"), turn("gpt", "x")]}, "1 <image> and 0 images"),
        ({"image": "a.png", "conversations": [turn("human", "Hi"), turn("gpt", "x")]}, "0 <image> and 1 images"),
        (
            {"image": ["a", "b"], "conversations": [turn("human", "<image>"), turn("gpt", "x")]},
            "1 <image> and 2 images",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        to_messages(row)


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_the_system_text_of_a_row_opens_its_conversation(key: str) -> None:
    row = {"system": "Be brief.", key: [turn("human", "Hi"), turn("gpt", "Yes?")]}
    messages = to_messages(row)
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == [{"type": "text", "text": "Be brief."}]


@pytest.mark.parametrize("chunk", [7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_cut_into_its_rows(tmp_path: Path, monkeypatch: Any, chunk: int, indent: int | None) -> None:
    """At every chunk size: rows, strings, escapes and characters of several bytes fall across the borders."""
    monkeypatch.setattr(row_index, "CHUNK_BYTES", chunk)
    rows = [
        {"id": 1, "text": 'a "quoted" \\ [{,'},
        {"id": 2, "text": "naïve 猫 😀"},
        {"n": [1, {"x": [2]}], "id": "]"},
        {},
    ]
    file = tmp_path / "rows.json"
    for escaped in (True, False):
        file.write_text(json.dumps(rows, indent=indent, ensure_ascii=escaped), encoding="utf-8")
        found = list(row_index.iterate_json_rows(file))
        assert [json.loads(data) for _, _, data in found] == rows
        content = file.read_bytes()
        assert [content[start:stop] for start, stop, _ in found] == [data for _, _, data in found]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("chunk", [5, 2**20])
def test_a_row_that_is_not_json_spoils_no_other(tmp_path: Path, monkeypatch: Any, suffix: str, chunk: int) -> None:
    monkeypatch.setattr(row_index, "CHUNK_BYTES", chunk)
    good = json.dumps({"conversations": [turn("human", 'Hi "\\'), turn("gpt", "x")]})
    deep = '{"id": ' + "[" * 20_000 + "]" * 20_000 + "}"
    surrogate = good.replace("Hi", r"\ud800")
    bad = [
        ('{"a": tru}', "not JSON"),
        (deep, "nested too deep"),
        (surrogate, "half a character"),
        ("3", "of type int"),
    ]
    bad += [('{"id": ' + "9" * 5000 + "}", "not JSON"), (good.replace("gpt", "\\ud800"), "from="), ("[1, 2]", "list")]
    lines = [good, *(line for line, _ in bad), good]
    text = "\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]"
    (tmp_path / f"rows{suffix}").write_text(text)
    rows = JsonRows(tmp_path / f"rows{suffix}")
    assert rows.index.entries["number"].tolist() == [0, len(lines) - 1]
    assert len(rows.messages(1)) == 2
    for (_, reason), (name, given) in zip(bad, rows.index.bad):
        assert reason in given and name.isprintable(), (name, given)


def test_a_damaged_index_is_built_again(tmp_path: Path) -> None:
    file = write_data(tmp_path / "data", 4)
    JsonRows(file, tmp_path / "data", tmp_path / "cache")
    (index,) = (tmp_path / "cache").iterdir()
    for content in (index.read_bytes()[:-40], b"", b"x" * 100):
        index.write_bytes(content)
        assert len(JsonRows(file, tmp_path / "data", tmp_path / "cache")) == 4


@pytest.mark.parametrize(
    "content", ['{"a": 1}', "[{} {", '[{"a": 1}', '["a', "", "[{}}, {}]", "[{}], {}]", "[{}]" + " " * 99 + "x"]
)
def test_a_broken_array_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(DataError, match=r"rows\.json"):
        list(row_index.iterate_json_rows(file))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_are_read_from_the_file(tmp_path: Path, suffix: str) -> None:
    file = write_data(tmp_path / "data", 8, suffix)
    rows = JsonRows(file, tmp_path / "data", tmp_path / "cache")
    assert [rows[row] for row in range(8)] == make_rows(8)
    assert rows.index.images.tolist() == [1, 1, 1, 0] * 2
    assert rows.messages(1)[0]["content"][0]["image"] == str(tmp_path / "data" / "1.png")
    assert rows.name(5) == "row 5 (id r5)"


def test_the_index_is_kept_until_the_file_changes(tmp_path: Path, monkeypatch: Any) -> None:
    file = write_data(tmp_path / "data", 8, ".jsonl")
    first = JsonRows(file, tmp_path / "data", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(JsonRows, "_build", lambda self: pytest.fail("built again"))
        again = JsonRows(file, tmp_path / "data", tmp_path / "cache")
    assert again.index.entries.tolist() == first.index.entries.tolist()
    write_rows(file, make_rows(6))
    assert len(JsonRows(file, tmp_path / "data", tmp_path / "cache")) == 6


def broken_data(folder: Path) -> Path:
    """Ten rows, of which 2 (no such image), 4 (no answer), 5 (not JSON) and 7 (mismatch) cannot be used."""
    file = write_data(folder, 10, ".jsonl", text_only_every=100)
    lines = file.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[2]["image"] = "none.png"
    rows[4]["conversations"].pop()
    rows[7]["image"] = ["7.png", "7.png"]
    lines = [json.dumps(row) for row in rows]
    lines[5] = lines[5][:-5]
    file.write_text("\n".join(lines))
    return file


def test_unusable_rows_are_skipped_and_named_or_fatal(tmp_path: Path) -> None:
    file = broken_data(tmp_path / "data")
    recipe = DataRecipe(path=str(file), images=str(tmp_path / "data"), cache=str(tmp_path / "cache"), on_error="skip")
    for _ in range(2):  # the second time from the cache
        rows = open_rows(recipe)
        assert len(rows) == 6
        assert [name for name, _ in rows.index.bad] == ["row 2 (id r2)", "row 4 (id r4)", "row 5", "row 7 (id r7)"]
        reasons = [reason for _, reason in rows.index.bad]
        assert "none.png does not exist" in reasons[0] and "no answer" in reasons[1]
        assert "not JSON" in reasons[2] and "1 <image> and 2 images" in reasons[3]
        assert rows.name(3) == "row 6 (id r6)"
    with pytest.raises(DataError, match=r"row 2 \(id r2\) cannot be used: .*none\.png.*the first of 4"):
        open_rows(recipe.model_copy(update={"on_error": "fail"}))


def test_data_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.json", [{"id": "a"}])
    recipe = DataRecipe(path=str(file), cache=str(tmp_path / "cache"), on_error="skip")
    with pytest.raises(DataError, match=r"no usable row\. row 0 \(id a\): it has no conversation"):
        open_rows(recipe)


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
    assert isinstance(opened, DatasetRows)
    assert opened.index.images.tolist() == [1, 0, 2]
    assert opened.index.bad == [("row 3", "it has no answer")]
    content = opened.messages(2)[0]["content"]
    assert [item["type"] for item in content] == ["image", "image", "text"]
    assert content[1]["image"].getpixel((3, 3)) == make_image(2).getpixel((3, 3))
    with pytest.raises(DataError, match="data.split=test: the dataset has train"):
        open_rows(DataRecipe(dataset=str(tmp_path / "saved"), split="test"))


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak")
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_665k_rows_need_less_than_a_gigabyte(tmp_path: Path, monkeypatch: Any, suffix: str) -> None:
    """The peak while the index is built, at 4,000 and 16,000 rows of 1 kB, extrapolated."""
    monkeypatch.setattr(row_index, "CHUNK_BYTES", 2**16)  # so that the index is not hidden behind buffers
    row = json.dumps({"id": "?", "conversations": [turn("human", "Hi" * 250), turn("gpt", "Ho" * 250)]})
    before, between, after = ("[", ",\n", "]") if suffix == ".json" else ("", "\n", "\n")
    growth = {}
    for count in (4_000, 16_000):
        file = tmp_path / f"{count}{suffix}"
        with file.open("w") as out:  # row by row: memory that this test freed would hide the index's
            for number in range(count):
                out.write((between if number else before) + row.replace("?", str(number)))
            out.write(after)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        start = memory("VmRSS")
        rows = JsonRows(file)
        growth[count] = memory("VmHWM") - start
        assert len(rows) == count and rows[count - 1]["id"] == str(count - 1)
    per_row = max(0, growth[16_000] - growth[4_000]) / 12_000
    assert growth[4_000] + per_row * 665_000 < 2**30, growth
    assert per_row < 300, growth  # a row itself has more than 1,000 bytes
