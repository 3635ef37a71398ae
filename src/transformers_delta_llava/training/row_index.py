"""Where the rows of a large JSON or JSONL file are, so that any of them can be read without holding the others."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError


CHUNK_BYTES = 4 * 2**20
MAX_ROW_BYTES = 64 * 2**20
COLUMNS = ("numbers", "starts", "stops", "lengths", "images")
FORMAT = 1  # of the cached index; a change makes old ones unread


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

    Raises:
        DataError: an array that is no JSON. A broken line of a JSONL file comes out as it is.
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
    """The decoder runs over bytes as Latin-1, one character each, so its positions are bytes whatever the encoding."""
    decoder = json.JSONDecoder()
    with path.open("rb") as file:
        buffer, base, position, opened = "", 0, 0, False
        at_end = False
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n,\ufeff\xef\xbb\xbf":
                position += 1
            if not opened and position < len(buffer):
                if buffer[position] != "[":
                    raise DataError(f"{path} is no JSON array of rows; name a file of rows, one a line, .jsonl.")
                opened, position = True, position + 1
                continue
            if opened and position < len(buffer) and buffer[position] == "]":
                return
            if position < len(buffer):
                try:
                    _, stop = decoder.raw_decode(buffer, position)
                    if stop < len(buffer) or at_end:
                        yield base + position, base + stop, buffer[position:stop].encode("latin-1")
                        position = stop
                        continue
                except json.JSONDecodeError as error:
                    cut = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 16
                    if at_end or not cut or len(buffer) - position > MAX_ROW_BYTES:
                        place = f"byte {base + error.pos}"
                        raise DataError(f"{path} is broken at {place}: {error.msg}.") from error
            if at_end:
                raise DataError(f"{path} ends before its array does.")
            chunk = file.read(CHUNK_BYTES)
            at_end = not chunk
            buffer, base, position = buffer[position:] + chunk.decode("latin-1"), base + position, 0


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
    if path.is_file():
        with np.load(path, allow_pickle=False) as saved:
            bad = [(name, reason) for name, reason in json.loads(saved["bad"].tobytes())]
            return RowIndex(**{name: saved[name] for name in COLUMNS}, bad=bad)
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
