"""The output appears complete or not at all, and nothing that was there is lost."""

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


def write(folder, *files):
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()
    return folder


def test_a_new_folder_appears_at_the_end(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        assert folder.parent.parent == tmp_path / "deep"
        assert not (tmp_path / "deep" / "out").exists()
        (folder / "file").touch()
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path / "deep" / "out") == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [(), ("old",)])
def test_a_failure_leaves_what_was_there(tmp_path, error, existing):
    if existing:
        write(tmp_path / "out", *existing)
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        raise error
    assert names(tmp_path) == ["out"] * bool(existing)
    assert not existing or names(tmp_path / "out") == ["old"]


def test_a_failure_to_rename_puts_the_old_output_back(tmp_path, monkeypatch):
    write(tmp_path / "out", REPORT_FILE, "old")
    rename = pathlib.Path.rename

    def fail_for_new(self, target):
        if self.name == "new":
            raise OSError("a disk that went away")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="went away"), atomic_folder(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == [REPORT_FILE, "old"]


def test_an_output_is_replaced_and_what_a_killed_run_left_is_cleared(tmp_path):
    write(tmp_path / "out", REPORT_FILE, "old")
    write(tmp_path / ".out.delta-llava" / "new", "half")
    (tmp_path / ".out.delta-llava" / "lock").touch()
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    write(tmp_path / ".out.delta-llava", "lock")
    write(tmp_path / ".out.delta-llava" / "previous", REPORT_FILE, "kept")
    write(tmp_path / ".out.delta-llava" / "new")
    with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "out"):
        raise OSError("disk full")
    assert names(tmp_path) == ["out"] and "kept" in names(tmp_path / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path, overwrite):
    message = "not written by this" if overwrite else "exists; pass"
    with pytest.raises(DeltaLlavaError, match=message), atomic_folder(tmp_path / "out", overwrite):
        write(tmp_path / "out", "theirs")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


def test_other_folders_of_the_user_stay(tmp_path):
    others = [".out.incomplete", ".out.previous", ".out.tmp"]
    for name in others:
        write(tmp_path / name, "kept")
    with atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [*others, "out"] and all(names(tmp_path / name) == ["kept"] for name in others)

    write(tmp_path / ".next.delta-llava", "kept")
    with pytest.raises(DeltaLlavaError, match="in the way"), atomic_folder(tmp_path / "next"):
        pass
    assert names(tmp_path / ".next.delta-llava") == ["kept"]


def test_a_second_run_for_one_output_is_refused_and_the_first_continues(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        with pytest.raises(DeltaLlavaError, match="Another process is writing"), atomic_folder(tmp_path / "out"):
            pass
        with atomic_folder(tmp_path / "other"):
            pass
    assert names(tmp_path) == ["other", "out"] and names(tmp_path / "out") == ["file"]


def test_what_a_killed_run_left_is_cleared_only_after_its_death(tmp_path):
    def write_forever():
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            time.sleep(60)

    child, pipe = start(write_forever)
    half = tmp_path / ".out.delta-llava" / "new" / "half"
    while not half.exists():
        time.sleep(0.01)
    with pytest.raises(DeltaLlavaError, match="Another process"), atomic_folder(tmp_path / "out"):
        pass
    assert half.exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(pipe)
    with atomic_folder(tmp_path / "out") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["out"]


def test_a_failure_after_the_output_has_appeared_is_only_logged(tmp_path, monkeypatch, caplog):
    write(tmp_path / "out", REPORT_FILE, "old")
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


def test_which_outputs_may_be_written(tmp_path):
    """A new or an empty folder, and with `overwrite` one that this package wrote."""
    check_output(tmp_path / "new", [], overwrite=False)
    check_output(write(tmp_path / "empty"), [], overwrite=False)
    check_output(write(tmp_path / "ours", REPORT_FILE), [], overwrite=True)
    check_output(write(tmp_path / "other", "other.json"), [], overwrite=True, marker="other.json")
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "new").touch()
    assert names(tmp_path / "empty") == ["new"]

    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(write(tmp_path / "nothing"))
    for name in ("ours", "dangling", "link"):
        with pytest.raises(DeltaLlavaError, match="exists; pass `overwrite=True`"):
            check_output(tmp_path / name, [], overwrite=False)
    with pytest.raises(DeltaLlavaError, match="not written by this package"):
        check_output(tmp_path / "other", [], overwrite=True)


@pytest.mark.parametrize("output", ["in", "in/side", ".", "link"])
def test_input_and_output_must_be_apart(tmp_path, output):
    source = write(tmp_path / "in")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(DeltaLlavaError, match="one folder or lie inside each other"):
        check_output(tmp_path / output, [source], overwrite=True)


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for overwrite in (False, True):
        with pytest.raises(DeltaLlavaError, match="a loop of symbolic links|exists|not written by this package"):
            check_output(tmp_path / "a", [tmp_path / "c"], overwrite)
