"""An index of the rows of a large JSON or JSONL file, so that each can be read without holding the others."""

import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import DataError


CHUNK_BYTES = 4 * 2**20
MAX_ROW_BYTES = 64 * 2**20
FORMAT = 3  # of the cached index; a change invalidates older ones
ENTRY = np.dtype([("number", "i8"), ("start", "i8"), ("stop", "i8"), ("length", "i4"), ("images", "i4")])
ARRAY_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
# Both match up to the next bracket outside strings, OUTER also up to a comma: between two rows only these matter.
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
OUTER = re.compile(rb'[^][{},"]*(?:' + _STRING + rb'[^][{},"]*)*([][{},])', re.DOTALL)
INNER = re.compile(rb'[^][{}"]*(?:' + _STRING + rb'[^][{}"]*)*([][{}])', re.DOTALL)


@dataclass(frozen=True)
class RowIndex:
    """
    The usable rows of a data source, in its order.

    Attributes:
        entries: (rows,) of `ENTRY`: number of the row in the source, its first and last byte in the file (0 for sources
            that are not files), size of its text, number of its images.
        bad: the other rows: (name, reason).
    """

    entries: np.ndarray
    bad: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int32, size of the text."""
        return self.entries["length"]

    @property
    def images(self) -> np.ndarray:
        """(rows,) int32, number of images."""
        return self.entries["images"]


def iterate_json_rows(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """
    Yield (start, stop, bytes) of every row of a JSON array or a JSONL file, a few megabytes in memory at a time.

    Rows are separated by brackets, quotes and commas alone: a row that is not JSON is yielded as it is.

    Raises:
        DataError: the file is not an array, ends before the array does, or goes on after it.
    """
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            start = 0
            for line in file:
                if line.strip():
                    yield start, start + len(line), line
                start += len(line)
    else:
        yield from _iterate_array(path)


def _iterate_array(path: Path) -> Iterator[tuple[int, int, bytes]]:
    with path.open("rb") as file:
        # `buffer` starts at byte `base` of the file; `row` is where the current row starts in it, `position` how far it
        # was scanned, `depth` the number of open brackets, 1 between two rows.
        buffer, base, depth, row, position = b"", 0, 0, 0, 0
        while chunk := file.read(CHUNK_BYTES):
            # Rows before the current one were yielded: only the current one is kept.
            buffer, base, position, row = buffer[row:] + chunk, base + row, position - row, 0
            if not depth:
                start = ARRAY_START.match(buffer)
                if start is None:
                    raise DataError(f"{path} is not a JSON array of rows; name a file with one row per line .jsonl.")
                depth, row, position = 1, start.end(), start.end()
            # No match: a string or a row goes on in the next chunk.
            while token := (OUTER if depth == 1 else INNER).match(buffer, position):
                sign, position = token.group(1), token.end()
                depth += (sign in b"[{") - (sign in b"]}")
                if not depth or sign == b",":
                    data = buffer[row : position - 1]
                    if data.strip():
                        yield base + row, base + position - 1, data
                    row = position
                if not depth:
                    if sign == b"}" or buffer[position:].strip() or file.read(CHUNK_BYTES).strip():
                        raise DataError(f"{path} goes on after its array ends, at byte {base + position - 1}.")
                    return
            if len(buffer) - row > MAX_ROW_BYTES:
                raise DataError(f"{path} has a row of more than {MAX_ROW_BYTES:,} bytes at byte {base + row}.")
    raise DataError(f"{path} ends before its array does.")


def build_index(
    rows: Iterator[tuple[int, int, Any]], measure: Callable[[Any], tuple[int, int]], name: Callable[[int, Any], str]
) -> RowIndex:
    """
    Read all rows once.

    Args:
        rows: (start, stop, row).
        measure: returns (length, number of images) of a row; a ValueError leaves the row out, its message is the reason.
        name: returns the name of a row, from its number and the row.
    """
    bad: list[tuple[str, str]] = []

    def usable() -> Iterator[tuple[int, int, int, int, int]]:
        for number, (start, stop, row) in enumerate(rows):
            try:
                length, images = measure(row)
            except ValueError as error:
                bad.append((name(number, row), str(error)))
                continue
            yield number, start, stop, length, images

    return RowIndex(np.fromiter(usable(), ENTRY), bad)


def cached_index(folder: Path, key: list[Any], build: Callable[[], RowIndex]) -> RowIndex:
    """The index stored in `folder` under `key`, or a new one, which is stored if the folder can be written."""
    digest = hashlib.sha256(json.dumps([FORMAT, *key], default=str).encode()).hexdigest()[:24]
    path = folder / f"rows-{digest}.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            return RowIndex(saved["entries"].astype(ENTRY), [(n, r) for n, r in json.loads(saved["bad"].tobytes())])
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        pass  # there is none, or it is damaged
    index = build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as file:
            bad = np.frombuffer(json.dumps(index.bad).encode(), dtype=np.uint8)
            np.savez(file, entries=index.entries, bad=bad)
        os.replace(file.name, path)
    except OSError:
        pass  # the cache only saves time
    return index
