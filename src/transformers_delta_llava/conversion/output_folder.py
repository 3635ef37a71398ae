"""An output folder appears complete or not at all."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConversionError


# A folder that holds this file was written by a conversion, so a conversion may replace it.
REPORT_FILE = "conversion.json"


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool, marker: str = REPORT_FILE) -> None:
    """Refuse an output that exists or that touches one of the `inputs` (local folders that will be read).

    With `overwrite` one that exists may be replaced if it holds the file `marker`, as what is written here does.

    Raises:
        ConversionError: saying which, and what would do.
    """
    place = _real(output)
    for folder in map(_real, inputs):
        if place == folder or place.is_relative_to(folder) or folder.is_relative_to(place):
            raise ConversionError(
                f"The output {output} and the input {folder.name} are one folder or lie inside each other; "
                "choose an output elsewhere."
            )
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise ConversionError(f"The output {output} exists; pass --overwrite (overwrite=True) to replace it.")
    if not (output / marker).is_file():
        raise ConversionError(
            f"The output {output} was not written by this command (no {marker} in it), so it is not replaced; "
            "remove it yourself or choose another output."
        )


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # before Python 3.13 a loop of links is a RuntimeError
        raise ConversionError(f"{path} cannot be followed to a folder: a loop of symbolic links?") from error


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` when the block ends, and vanishes when it fails.

    What stands at `output` is replaced only then, after everything has reached the disk. The name is fixed, so that what
    a killed run left is cleared; where the kill fell between the two renames, the earlier output comes back first.
    """
    output = _real(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    growing = output.with_name(f".{output.name}.incomplete")
    previous = output.with_name(f".{output.name}.previous")
    if previous.exists() and not output.exists():
        previous.rename(output)
    _remove(growing)
    growing.mkdir()
    try:
        yield growing
        _sync(growing)
        _remove(previous)
        if output.exists():
            output.rename(previous)
        growing.rename(output)
        _sync_entry(output.parent)
        _remove(previous)
    except BaseException:
        _remove(growing)
        if previous.exists() and not output.exists():
            previous.rename(output)
        raise


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """Wait until all files in `folder` are on the disk: a rename may outlive a power cut that the bytes do not."""
    for path in folder.rglob("*"):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
