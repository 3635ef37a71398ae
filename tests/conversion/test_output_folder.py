"""The output appears complete or not at all."""

import pytest

from transformers_delta_llava.conversion import ConversionError
from transformers_delta_llava.conversion.output_folder import REPORT_FILE, atomic_folder, check_output


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        assert folder.parent == tmp_path / "deep"
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


def test_a_failure_to_rename_puts_the_old_output_back(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OSError), atomic_folder(tmp_path / "out") as folder:
        folder.rmdir()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_what_was_there_is_replaced_and_leftovers_are_cleared(tmp_path):
    for name in ("out", ".out.incomplete", ".out.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_an_output_that_exists_needs_overwrite(tmp_path):
    (tmp_path / REPORT_FILE).touch()
    with pytest.raises(ConversionError, match="exists; pass --overwrite"):
        check_output(tmp_path, [], overwrite=False)
    check_output(tmp_path, [], overwrite=True)
    check_output(tmp_path / "new", [], overwrite=False)


def test_only_a_conversions_output_is_replaced(tmp_path):
    with pytest.raises(ConversionError, match="not written by this command"):
        check_output(tmp_path, [], overwrite=True)
    (tmp_path / "other.json").touch()
    check_output(tmp_path, [], overwrite=True, marker="other.json")


def test_a_dangling_link_is_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match="exists"):
        check_output(tmp_path / "link", [], overwrite=False)


@pytest.mark.parametrize("output", ["in", "in/side", ".", "link"])
def test_input_and_output_must_be_apart(tmp_path, output):
    source = tmp_path / "in"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ConversionError, match="one folder or lie inside each other"):
        check_output(tmp_path / output, [source], overwrite=True)


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ConversionError, match="a loop of symbolic links|exists"):
        check_output(tmp_path / "a", [tmp_path], overwrite=False)
    with pytest.raises(ConversionError, match="not written by this command|a loop of symbolic links"):
        check_output(tmp_path / "a", [], overwrite=True)


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    (tmp_path / ".out.previous").mkdir()
    (tmp_path / ".out.previous" / "kept").touch()
    (tmp_path / ".out.incomplete").mkdir()
    with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "out"):
        raise OSError("disk full")
    assert (tmp_path / "out" / "kept").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
