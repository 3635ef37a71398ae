"""An output folder appears complete or not at all, and replaces another one only where that was asked for."""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import DeltaLlavaError


logger = logging.getLogger(__name__)

# A folder that holds this file was written by a conversion, so a conversion may replace it.
REPORT_FILE = "conversion.json"
# In the report of a checkpoint that export wrote: what it was exported from.
EXPORTED_FROM = "exported_from"
_LOCK = "lock"


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool, marker: str = REPORT_FILE) -> None:
    """Refuse an output that exists and is not empty, or that touches one of the `inputs` (local folders that will be read).

    With `overwrite` one that exists may be replaced if it holds the file `marker`, as what is written here does.

    Raises:
        DeltaLlavaError: saying which, and what to do instead.
    """
    place = _real(output)
    for folder in map(_real, inputs):
        if place == folder or place.is_relative_to(folder) or folder.is_relative_to(place):
            raise DeltaLlavaError(
                f"The output {output} and the input {folder.name} are one folder or lie inside each other; "
                "choose an output elsewhere."
            )
    _refuse_existing(output, overwrite, marker)


def _refuse_existing(output: Path, overwrite: bool, marker: str) -> None:
    if not os.path.lexists(output) or (output.is_dir() and not output.is_symlink() and not any(output.iterdir())):
        return  # of an empty folder nothing is lost
    if not overwrite:
        raise DeltaLlavaError(f"The output {output} exists; pass --overwrite (overwrite=True) to replace it.")
    if not (output / marker).is_file():
        raise DeltaLlavaError(
            f"The output {output} was not written by this command (no {marker} in it), so it is not replaced; "
            "remove it yourself or choose another output."
        )


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # before Python 3.13 a loop of links is a RuntimeError
        raise DeltaLlavaError(f"{path} cannot be followed to a folder: a loop of symbolic links?") from error


@contextmanager
def atomic_folder(output: Path, overwrite: bool = False, marker: str = REPORT_FILE) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends, and vanishes when it fails.

    It lies in `.NAME.delta-llava` beside the output, which holds a lock while its owner lives: a second run for the same
    output is refused, and what a killed run left is cleared by the next one. An earlier output is moved in there just
    before the new one takes its place, after everything has reached the disk; where a kill fell between the two, the
    next run moves it back first.

    Args:
        output: folder to write.
        overwrite: replace a folder there that holds the file `marker`; checked at the end, too, because one may have
            appeared in the meantime.
        marker: see `overwrite`.

    Raises:
        DeltaLlavaError: another run writes this output, or a folder is in the way.
        OSError: a folder cannot be written.
    """
    output = _real(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _own(output.with_name(f".{output.name}.delta-llava"), output) as work:
        new, previous = work / "new", work / "previous"
        if previous.exists() and not output.exists():
            previous.rename(output)
        for rest in (new, previous):
            if rest.exists():
                shutil.rmtree(rest)
        new.mkdir()
        try:
            yield new
            _sync(new)
            _refuse_existing(output, overwrite, marker)
            if output.exists():
                output.rename(previous)
            new.rename(output)
        except BaseException:
            if previous.exists() and not output.exists():
                previous.rename(output)
            raise
        # The output is there: nothing that fails from here on may say otherwise.
        try:
            _sync_entry(output.parent)
            if previous.exists():
                shutil.rmtree(previous)
        except OSError as error:
            logger.warning("%s is written, but of what it replaced something is left in %s: %s", output, work, error)


@contextmanager
def _own(work: Path, output: Path) -> Iterator[Path]:
    """`work`, created or taken over from a run that ended without clearing it, locked, and removed in the end."""
    lock = FileLock(work / _LOCK, timeout=0)
    while not lock.is_locked:
        work.mkdir(exist_ok=True)
        if not (work / _LOCK).exists() and any(work.iterdir()):
            raise DeltaLlavaError(f"{work} is in the way: this package did not write it; move it elsewhere.")
        try:
            lock.acquire()
        except Timeout:
            raise DeltaLlavaError(
                f"Another process is writing the output {output}; wait for it, or choose another output."
            ) from None
        except FileNotFoundError:  # the last owner removed the folder just now
            continue
    try:
        yield work
    finally:
        if not (work / "previous").exists() or output.exists():
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


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
