"""The package's error, JSON files, and outputs that appear whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError


# In the folder that a conversion wrote, so that another conversion may replace it.
REPORT_FILE = "conversion.json"


class DeltaLlavaError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do instead."""


def one_line(error: BaseException | str, limit: int = 2000) -> str:
    r"""The message of `error` as one printable line of at most `limit` characters; control characters are escaped."""
    if isinstance(error, ValidationError):
        faults = error.errors(include_url=False)
        text = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".lstrip(": ") for fault in faults[:3])
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.strerror}: {error.filename}"
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text[: 10 * limit].split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def format_names(names: Iterable[str], limit: int = 8) -> str:
    """`names`, sorted and joined for a message; past `limit` only their number is given."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        DeltaLlavaError: not valid JSON, or not an object.
        OSError: the file cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DeltaLlavaError(f"{path.name} is not valid JSON: {one_line(error, 300)}") from error
    if not isinstance(value, dict):
        raise DeltaLlavaError(f"{path.name} should hold a JSON object, not a {type(value).__name__}")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write `value` in the same bytes every time."""
    path.write_text(json_text(value), encoding="utf-8", newline="\n")


def json_text(value: dict[str, Any]) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def sha256_of(file: Path) -> str:
    """The hash of a file of any size."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_output(output: Path, overwrite: bool = False, marker: str = REPORT_FILE) -> None:
    """Refuse an output folder that could not be written, before the work of writing it.

    Args:
        output: may exist if it is an empty folder, or with `overwrite` a folder that contains the file `marker`.
        overwrite, marker: see `output`.

    Raises:
        DeltaLlavaError: something else is there, or the folder is a mount point, which cannot be renamed.
    """
    if not os.path.lexists(output):
        return
    if output.is_dir() and os.path.ismount(output):
        raise DeltaLlavaError(f"{output} is a mount point; choose a folder inside it")
    if output.is_dir() and not output.is_symlink() and not any(output.iterdir()):
        return
    if not overwrite:
        raise DeltaLlavaError(f"{output} exists; pass overwrite=True to replace it")
    if not (output / marker).is_file():
        raise DeltaLlavaError(f"{output} was not written by this package (it has no {marker}), so it is not replaced")


@contextmanager
def output_folder(output: Path, overwrite: bool = False, marker: str = REPORT_FILE) -> Iterator[Path]:
    """A temporary folder next to `output` that takes its place when the block ends, and is removed when it fails.

    Args:
        output, overwrite, marker: as for `check_output`, which is called before and after the block.

    Raises:
        DeltaLlavaError: `output` may not be written.
        OSError: it cannot be written.
    """
    output = output.resolve()
    check_output(output, overwrite, marker)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    new, previous = temporary / "new", temporary / "previous"
    try:
        new.mkdir()
        yield new
        check_output(output, overwrite, marker)
        if output.exists():
            output.rename(previous)
        new.rename(output)
    finally:
        if previous.exists() and not output.exists():
            previous.rename(output)
        shutil.rmtree(temporary, ignore_errors=True)
