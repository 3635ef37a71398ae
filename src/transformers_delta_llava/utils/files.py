"""JSON files, read with care for what strangers may have put there."""

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DeltaLlavaError, one_line, shorten


# Far above any config, index or tokenizer; JSON takes about ten times its size in memory.
MAX_JSON_BYTES = 256 * 2**20
MAX_JSON_DEPTH = 100


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a pipe, a socket or a device, which may never end, is refused at once.

    Raises:
        DeltaLlavaError: it is not a regular file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DeltaLlavaError(f"{shorten(path.name)} is not a regular file.")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        DeltaLlavaError: not a regular file, more than `limit` bytes, or not UTF-8.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DeltaLlavaError(f"{shorten(path.name)} has more than {limit:,} bytes.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DeltaLlavaError(f"{shorten(path.name)} is not UTF-8 text: {one_line(error)}.") from error


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        DeltaLlavaError: not a regular file, more than `limit` bytes, not JSON, not an object, nested more than
            `MAX_JSON_DEPTH` deep, or a key with two values.
        OSError: it cannot be read.
    """
    name, text = shorten(path.name), read_text(path, limit)
    try:
        value = parse_json(text)
    except DeltaLlavaError as error:
        raise DeltaLlavaError(f"{name} is not valid JSON: {one_line(error)}.") from error
    if not isinstance(value, dict):
        raise DeltaLlavaError(f"{name} should hold a JSON object, but holds a {type(value).__name__}.")
    return value


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        DeltaLlavaError: not JSON, nested more than `MAX_JSON_DEPTH` deep, a key with two values, or half a
            character (a lone surrogate), which no file can hold.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if r"\ud" in text or r"\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise DeltaLlavaError("nested too deep") from None
    except UnicodeEncodeError as error:
        raise DeltaLlavaError("a string in it holds half a character (a lone surrogate)") from error
    except ValueError as error:
        raise DeltaLlavaError(one_line(error)) from error
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise DeltaLlavaError(f"nested more than {MAX_JSON_DEPTH} deep")
    return value


def write_json(value: dict, path: Path) -> None:
    """Write `value` in the same bytes every time."""
    path.write_bytes(json_bytes(value))


def json_bytes(value: dict) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def refuse_special_files(folder: Path) -> None:
    """Refuse a folder in which a pipe, a socket or a device lies: libraries that read the folder would wait for ever.

    Raises:
        DeltaLlavaError: naming the first.
        OSError: the folder cannot be read.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        try:
            mode = entry.stat().st_mode
        except OSError:  # a dead link: whoever needs it finds no file
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise DeltaLlavaError(f"{shorten(entry.name)} in {shorten(folder.name)} is not a regular file.")


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result and result[key] != value:
            raise DeltaLlavaError(f"the key {shorten(key)} has two values")
        result[key] = value
    return result


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
