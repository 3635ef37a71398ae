"""Where the rows of a large JSON or JSONL file are, so that any of them can be read without holding the others."""

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
COLUMNS = ("numbers", "starts", "stops", "lengths", "images")
OPENING = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
# Up to and with the next sign outside strings: between rows, and within one.
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
OUTER = re.compile(rb'[^][{},"]*(?:' + _STRING + rb'[^][{},"]*)*([][{},])', re.DOTALL)
INNER = re.compile(rb'[^][{}"]*(?:' + _STRING + rb'[^][{}"]*)*([][{}])', re.DOTALL)
FORMAT = 2  # of the cached index; a change makes old ones unread


@dataclass(frozen=True)
class RowIndex:
    """
    The usable rows of a data source, in its order.

    Attributes:
        numbers: (rows,) int64, the place of each in the source.
        starts, stops: (rows,) int64, bytes of each in the file; empty for sources that are no file.
        lengths: (rows,) int32, size of the text in bytes.
        images: (rows,) int32, number of images.
        bad: rows left out: (name, reason).
    """

    numbers: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    bad: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.numbers)


def iterate_json_rows(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """
    (start, stop, bytes) of every row of a JSON array or a JSONL file, a few megabytes in memory at a time.

    Rows are told apart by brackets, quotes and commas alone: one that is not JSON comes out as it is.

    Raises:
        DataError: the file is not an array, or ends before the array does, or goes on after it.
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
        buffer, base, depth, row, position = b"", 0, 0, 0, 0  # `row`: where the row that is being read begins
        while chunk := file.read(CHUNK_BYTES):
            buffer, base, position, row = buffer[row:] + chunk, base + row, position - row, 0
            if not depth:
                opened = OPENING.match(buffer)
                if opened is None:
                    raise DataError(f"{path} is not a JSON array of rows; name a file of rows, one a line, .jsonl.")
                depth, row, position = 1, opened.end(), opened.end()
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
    Go through all rows once.

    Args:
        rows: (start, stop, row).
        measure: (length, number of images) of a row; a ValueError leaves the row out, with the message as the reason.
        name: what to call a row, from its number and the row.
    """
    columns: list[list[int]] = [[] for _ in range(5)]
    bad: list[tuple[str, str]] = []
    for number, (start, stop, row) in enumerate(rows):
        try:
            length, images = measure(row)
        except ValueError as error:
            bad.append((name(number, row), str(error)))
            continue
        for column, value in zip(columns, (number, start, stop, length, images)):
            column.append(value)
    arrays = [np.array(column, dtype=dtype) for column, dtype in zip(columns, ("i8", "i8", "i8", "i4", "i4"))]
    return RowIndex(**dict(zip(COLUMNS, arrays)), bad=bad)


def cached_index(folder: Path, key: list[Any], build: Callable[[], RowIndex]) -> RowIndex:
    """The index kept in `folder` under `key`, or a new one, kept from now on (where the folder can be written)."""
    digest = hashlib.sha256(json.dumps([FORMAT, *key], default=str).encode()).hexdigest()[:24]
    path = folder / f"rows-{digest}.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            bad = [(name, reason) for name, reason in json.loads(saved["bad"].tobytes())]
            return RowIndex(**{name: saved[name] for name in COLUMNS}, bad=bad)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # there is none, or it is damaged
    index = build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as file:
            reasons = np.frombuffer(json.dumps(index.bad).encode(), dtype=np.uint8)
            np.savez(file, bad=reasons, **{name: getattr(index, name) for name in COLUMNS})
        os.replace(file.name, path)
    except OSError:
        pass  # a cache that cannot be written is done without
    return index
