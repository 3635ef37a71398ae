"""Outputs that appear whole or not at all, JSON, and errors as one line."""

import json
import os
import pathlib

import pytest
from pydantic import BaseModel, ValidationError

from transformers_delta_llava.conversion import convert_checkpoint, export_checkpoint
from transformers_delta_llava.errors import (
    REPORT_FILE,
    DeltaLlavaError,
    format_names,
    one_line,
    output_folder,
    read_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, *files):
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()
    return folder


def test_an_output_appears_at_the_end_and_replaces_an_earlier_one(tmp_path):
    write(tmp_path / "deep" / "out", REPORT_FILE, "old")
    with output_folder(tmp_path / "deep" / "out", overwrite=True) as folder:
        (folder / "file").touch()
        assert names(tmp_path / "deep" / "out") == [REPORT_FILE, "old"]
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path / "deep" / "out") == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [[], [REPORT_FILE, "old"]])
def test_a_failure_leaves_what_was_there(tmp_path, error, existing):
    write(tmp_path / "out", *existing)
    with pytest.raises(error), output_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "file").touch()
        raise error
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == existing


def test_a_failure_to_rename_puts_the_old_output_back(tmp_path, monkeypatch):
    def fail_for_new(self, target):
        if self.name == "new":
            raise OSError("a disk that went away")
        return rename(self, target)

    write(tmp_path / "out", REPORT_FILE, "old")
    rename = pathlib.Path.rename
    monkeypatch.setattr(pathlib.Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="went away"), output_folder(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == [REPORT_FILE, "old"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path, overwrite):
    with pytest.raises(DeltaLlavaError, match="out"), output_folder(tmp_path / "out", overwrite):
        write(tmp_path / "out", "theirs")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


@pytest.mark.parametrize("function", [convert_checkpoint, export_checkpoint])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(function, tmp_path, monkeypatch):
    output = write(tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == output)
    with pytest.raises(DeltaLlavaError, match="mount point"):
        function(tmp_path / "no-source", output)
    write(tmp_path / "theirs", "file")
    with pytest.raises(DeltaLlavaError, match=REPORT_FILE):
        function(tmp_path / "no-source", tmp_path / "theirs", overwrite=True)


@pytest.mark.parametrize("text", ["{", "[]", "", "\x00"])
def test_json_that_is_no_object(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DeltaLlavaError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps({"a": 1}), encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"a": 1}


class Model(BaseModel):
    number: int


def test_errors_are_one_printable_line():
    assert one_line(ValueError("two\nlines \x1b[2J")) == "two lines \\x1b[2J"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(FileNotFoundError(2, "No such file", "a/b")) == "No such file: a/b"
    assert len(one_line("x" * 10_000, 300)) == 300
    with pytest.raises(ValidationError) as invalid:
        Model(number="x")
    assert one_line(invalid.value).startswith("number: ")
    assert format_names("cba") == "a, b, c" and format_names(map(str, range(100)), 2) == "0, 1 and 98 more"
