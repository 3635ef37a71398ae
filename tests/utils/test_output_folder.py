"""The output appears complete or not at all."""

import os
import pathlib
import shutil
import signal
import time

import pytest

from tests.robustness.children import start
from transformers_delta_llava.utils import files
from transformers_delta_llava.utils.errors import DeltaLlavaError
from transformers_delta_llava.utils.files import REPORT_FILE, atomic_folder, check_output


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        assert folder.parent.parent == tmp_path / "deep"
        assert not (tmp_path / "deep" / "out").exists()
        (folder / "file").write_text("1")
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(ValueError), atomic_folder(tmp_path / "out"):
        raise ValueError
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_a_failure_to_rename_puts_the_old_output_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    (tmp_path / "out" / REPORT_FILE).touch()
    rename = pathlib.Path.rename

    def fail_for_new(self, target):
        if self.name == "new":
            raise OSError("a disk that went away")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="went away"), atomic_folder(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [REPORT_FILE, "old"]


def write_output(folder, **files):
    folder.mkdir(parents=True)
    for name, text in {REPORT_FILE: "{}", **files}.items():
        (folder / name).write_text(text)


def test_what_was_there_is_replaced_and_what_a_killed_run_left_is_cleared(tmp_path):
    write_output(tmp_path / "out", old="")
    write_output(tmp_path / ".out.delta-llava" / "new")
    (tmp_path / ".out.delta-llava" / "lock").touch()
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path, overwrite):
    message = "not written by this" if overwrite else "exists; pass"
    with pytest.raises(DeltaLlavaError, match=message), atomic_folder(tmp_path / "out", overwrite):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["theirs"]


def test_folders_of_the_users_own_stay(tmp_path):
    for name in (".out.previous", ".out.incomplete", ".out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == [".out.incomplete", ".out.previous", ".out.tmp", "out"]
    assert all(names(tmp_path / name) == ["kept"] for name in (".out.previous", ".out.incomplete", ".out.tmp"))


def test_a_folder_of_the_users_own_under_the_temporary_name_stays(tmp_path):
    (tmp_path / ".out.delta-llava").mkdir()
    (tmp_path / ".out.delta-llava" / "kept").touch()
    with pytest.raises(DeltaLlavaError, match="in the way"), atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path / ".out.delta-llava") == ["kept"]


def test_a_second_run_for_one_output_is_refused_and_the_first_goes_on(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        with pytest.raises(DeltaLlavaError, match="Another process is writing"), atomic_folder(tmp_path / "out"):
            pass
        with atomic_folder(tmp_path / "other"):
            pass
    assert names(tmp_path) == ["other", "out"]
    assert names(tmp_path / "out") == ["file"]


def test_what_a_killed_run_left_is_cleared_only_after_its_death(tmp_path):
    def write_forever():
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            time.sleep(60)

    child, pipe = start(write_forever)
    while not (tmp_path / ".out.delta-llava" / "new" / "half").exists():
        time.sleep(0.01)
    with pytest.raises(DeltaLlavaError, match="Another process"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.delta-llava" / "new" / "half").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(pipe)
    with atomic_folder(tmp_path / "out") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["out"]


def test_what_fails_after_the_output_is_there_is_no_error(tmp_path, monkeypatch, caplog):
    write_output(tmp_path / "out", old="")
    rmtree = shutil.rmtree

    def refuse_previous(path, ignore_errors=False):
        if os.path.lexists(path / "old") or not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path, ignore_errors)

    monkeypatch.setattr(files.shutil, "rmtree", refuse_previous)
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path / "out") == ["new"]
    assert "is written, but" in caplog.text


def test_an_output_that_exists_needs_overwrite(tmp_path):
    (tmp_path / REPORT_FILE).touch()
    with pytest.raises(DeltaLlavaError, match="exists; pass `overwrite=True`"):
        check_output(tmp_path, [], overwrite=False)
    check_output(tmp_path, [], overwrite=True)
    check_output(tmp_path / "new", [], overwrite=False)


def test_an_empty_output_is_no_output(tmp_path):
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", [], overwrite=False)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert names(tmp_path / "out") == ["new"] and names(tmp_path) == ["out"]
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeltaLlavaError, match="exists; pass `overwrite=True`"):
        check_output(tmp_path / "link", [], overwrite=False)


def test_only_a_conversions_output_is_replaced(tmp_path):
    (tmp_path / "theirs").touch()
    with pytest.raises(DeltaLlavaError, match="not written by this package"):
        check_output(tmp_path, [], overwrite=True)
    (tmp_path / "other.json").touch()
    check_output(tmp_path, [], overwrite=True, marker="other.json")


def test_a_dangling_link_is_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DeltaLlavaError, match="exists"):
        check_output(tmp_path / "link", [], overwrite=False)


@pytest.mark.parametrize("output", ["in", "in/side", ".", "link"])
def test_input_and_output_must_be_apart(tmp_path, output):
    source = tmp_path / "in"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(DeltaLlavaError, match="one folder or lie inside each other"):
        check_output(tmp_path / output, [source], overwrite=True)


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DeltaLlavaError, match="a loop of symbolic links|exists"):
        check_output(tmp_path / "a", [tmp_path], overwrite=False)
    with pytest.raises(DeltaLlavaError, match="not written by this package|a loop of symbolic links"):
        check_output(tmp_path / "a", [], overwrite=True)


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    write_output(tmp_path / ".out.delta-llava" / "previous", kept="")
    (tmp_path / ".out.delta-llava" / "new").mkdir()
    (tmp_path / ".out.delta-llava" / "lock").touch()
    with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "out"):
        raise OSError("disk full")
    assert (tmp_path / "out" / "kept").exists()
    assert names(tmp_path) == ["out"]
