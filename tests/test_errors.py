"""Messages fit into one line; an output is whole or not there; JSON says which file is broken."""

import os
import signal
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from transformers_delta_llava.errors import (
    DeltaLlavaError,
    check_output,
    format_names,
    one_line,
    output_folder,
    read_json,
)


def test_a_message_is_one_printable_line():
    class Sizes(BaseModel):
        width: int

    with pytest.raises(ValidationError) as invalid:
        Sizes(width="wide")
    assert one_line("two\n  lines\x1b]0;owned\ud800") == r"two lines\x1b]0;owned\ud800"
    assert one_line(invalid.value).startswith("width: ")
    assert one_line(OSError(28, "No space left on device", "a.bin")) == "No space left on device: a.bin"
    assert one_line(AssertionError()) == "AssertionError"
    assert len(one_line("x" * 10**6)) == 2000
    assert format_names(f"n{i}" for i in range(12)) == "n0, n1, n10, n11, n2, n3, n4, n5 and 4 more"


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": ' + "[" * 10**5])
def test_a_broken_json_file_is_named(tmp_path: Path, text: str):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(DeltaLlavaError, match=r"broken\.json"):
        read_json(tmp_path / "broken.json")
    (tmp_path / "good.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_json(tmp_path / "good.json") == {"a": 1}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_output_is_whole_or_not_there(tmp_path: Path):
    output = tmp_path / "out"
    with pytest.raises(RuntimeError), output_folder(output) as new:
        (new / "conversion.json").touch()
        raise RuntimeError
    assert not names(tmp_path)
    with output_folder(output) as new:
        (new / "conversion.json").touch()
    assert names(output) == {"conversion.json"} and names(tmp_path) == {"out"}
    with pytest.raises(DeltaLlavaError, match="overwrite=True"), output_folder(output):
        pass
    with pytest.raises(RuntimeError), output_folder(output, overwrite=True):
        raise RuntimeError
    assert names(output) == {"conversion.json"}
    with output_folder(output, overwrite=True) as new:
        (new / "second").touch()
    assert names(output) == {"second"} and names(tmp_path) == {"out"}


def test_what_others_wrote_is_not_replaced(tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(DeltaLlavaError, match="not written by this package"):
        check_output(tmp_path / "notes", overwrite=True)
    check_output(tmp_path / "new")
    if os.path.ismount("/proc"):
        with pytest.raises(DeltaLlavaError, match="mount point"):
            check_output(Path("/proc"), overwrite=True)


def test_a_kill_leaves_the_earlier_output(tmp_path: Path):
    with output_folder(tmp_path / "out") as new:
        (new / "conversion.json").write_text("earlier")
    if not (child := os.fork()):
        with output_folder(tmp_path / "out", overwrite=True) as new:
            (new / "conversion.json").write_text("later")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "out" / "conversion.json").read_text() == "earlier"
