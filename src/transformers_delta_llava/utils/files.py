"""Files and folders: JSON read with care, outputs that appear whole or not at all, Hub ids as local folders."""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .errors import DeltaLlavaError, one_line, shorten


logger = logging.getLogger(__name__)

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


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


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


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def refuse_special_files(folder: Path) -> None:
    """Refuse a folder in which a pipe, a socket or a device lies: libraries that read the folder would hang.

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


# Where the Hub's client keeps downloads: the last folder's name is a commit.
_CACHED = re.compile(r"(?:.*[/\\])?models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\][0-9a-f]{40}[/\\]?")
_LONGEST_PATH = 4096
_COMMIT = re.compile(r"[0-9a-f]{40}")
# First parts of paths on the machine that trained a model, which look like owners on the Hub.
_FOLDER = re.compile(
    r"(?:.*[_-])?(?:artifact|cache|checkpoint|ckpt|data|dataset|download|exp|experiment|home|llm|local|log|mnt|model|opt|out"
    r"|output|playground|pretrain|pretrained|release|result|root|run|save|saved|scratch|share|shared|storage|tmp|train"
    r"|trained|training|user|weight|work|workdir|work_dir|workspace|zoo)s?",
    re.IGNORECASE,
)


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a Hub id, `owner/name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text  # names without an owner are ids to huggingface_hub


def check_repo_id(text: str, or_folder: bool = False) -> None:
    """Refuse what is not a Hub id; with `or_folder` the error says that it is not a folder either.

    Raises:
        DeltaLlavaError: naming the text and the form.
    """
    if not is_repo_id(text):
        what = "a folder, and not a Hub id (owner/name) either" if or_folder else "a Hub id of the form owner/name"
        raise DeltaLlavaError(f"{shorten(text)} is not {what}.")


def cached_repo_id(path: str) -> str | None:
    """The Hub id of a path into the Hub's cache, on whatever machine; None for any other path."""
    match = _CACHED.fullmatch(path) if len(path) <= _LONGEST_PATH else None
    return f"{match[1]}/{match[2]}" if match else None


def public_name(model_id: str) -> str:
    """A name that may be published: a Hub id as it is, of a path only its last part that says something."""
    if is_repo_id(model_id) and not Path(model_id).exists():
        return model_id
    path = Path(model_id).resolve()
    if cached := cached_repo_id(str(path)):
        return cached
    named = (part.name for part in (path, *path.parents) if not _COMMIT.fullmatch(part.name))
    return next(name for name in named if name != "snapshots")


def hub_id_of(name: object, *folders: Path) -> str | None:
    """The Hub id that a config names, in a form that may be published.

    Args:
        name: as it stands in a config: a Hub id, or a path of the machine that trained the checkpoint.
        folders: where `name` would be a path, besides the working directory.

    Returns:
        None where it is a path, or may be one: a wrong Hub id would lead readers to somebody else's model.
    """
    if not isinstance(name, str):
        return None
    if cached := cached_repo_id(name):
        return cached
    if not is_repo_id(name) or any((folder / name).exists() for folder in (Path(), *folders)):
        return None
    owner, _, last = name.partition("/")
    is_path = _FOLDER.fullmatch(owner) or _COMMIT.fullmatch(last) or last.startswith("checkpoint-")
    return None if is_path else name


def local_folder(model_id: str, kind: str, patterns: tuple[str, ...], argument: str | None = None) -> Path:
    """The folder at `model_id`, or a download of those files of the Hub repo `model_id` that match `patterns`.

    Args:
        model_id: a folder or a Hub id.
        kind: what it is expected to be, for the error message.
        patterns: shell patterns of the files to download.
        argument: of the caller's function that gives it, for the error message.

    Raises:
        DeltaLlavaError: it is neither a folder nor a repo that can be reached, or a pipe or device lies in the folder.
    """
    if Path(model_id).is_dir():
        refuse_special_files(Path(model_id))
        return Path(model_id)
    as_argument = f" as `{argument}=...`" if argument else ""
    if not is_repo_id(model_id):
        remedy = f"; pass its folder or Hub id{as_argument}" if argument else ""
        raise DeltaLlavaError(f"The {kind} {model_id} is not a folder, and not a Hub id (owner/name) either{remedy}.")
    try:
        return Path(snapshot_download(model_id, allow_patterns=list(patterns)))
    except Exception as error:  # an unexpected answer may raise anything
        reason = one_line(str(error).strip().partition("\n")[0] or error)
        raise DeltaLlavaError(
            f"The {kind} {model_id} is not a folder here, and cannot be downloaded from the Hub ({reason}); "
            f"pass the path of a local copy{as_argument}."
        ) from error


# A folder that holds this file was written by a conversion, so a conversion may replace it.
REPORT_FILE = "conversion.json"
# In the report of a checkpoint that export wrote: what it was exported from.
EXPORTED_FROM = "exported_from"


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool, marker: str = REPORT_FILE) -> None:
    """Refuse an output that exists and is not empty, or that touches one of the `inputs` (local folders that will be read).

    With `overwrite` one that exists may be replaced if it holds the file `marker`, as what is written here does.

    Raises:
        DeltaLlavaError: saying which, and what to do instead.
    """
    target = _resolve(output)
    for folder in map(_resolve, inputs):
        if target.is_relative_to(folder) or folder.is_relative_to(target):
            raise DeltaLlavaError(
                f"The output {output} and the input {folder.name} are one folder or lie inside each other; "
                "choose an output elsewhere."
            )
    _refuse_existing(output, overwrite, marker)


def is_free(output: Path) -> bool:
    """Whether nothing is lost when `output` is written: it does not exist, or is an empty folder."""
    return not os.path.lexists(output) or (output.is_dir() and not output.is_symlink() and not any(output.iterdir()))


def _refuse_existing(output: Path, overwrite: bool, marker: str) -> None:
    if is_free(output):
        return
    if not overwrite:
        raise DeltaLlavaError(f"The output {output} exists; pass `overwrite=True` to replace it.")
    if not (output / marker).is_file():
        raise DeltaLlavaError(
            f"The output {output} was not written by this package (no {marker} in it), so it is not replaced; "
            "remove it yourself or choose another output."
        )


def _resolve(path: Path) -> Path:
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
    output = _resolve(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _lock(output.with_name(f".{output.name}.delta-llava"), output) as work:
        new, previous = work / "new", work / "previous"
        if previous.exists() and not output.exists():
            previous.rename(output)
        for rest in (new, previous):
            if rest.exists():
                shutil.rmtree(rest)
        new.mkdir()
        try:
            yield new
            _sync([*new.rglob("*"), new])
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
            _sync([output.parent])
            if previous.exists():
                shutil.rmtree(previous)
        except OSError as error:
            logger.warning("%s is written, but of what it replaced something is left in %s: %s", output, work, error)


@contextmanager
def _lock(work: Path, output: Path) -> Iterator[Path]:
    """`work`, created or taken over from a run that ended without clearing it, locked, and removed in the end."""
    file = work / "lock"
    lock = FileLock(file, timeout=0)
    while not lock.is_locked:
        work.mkdir(exist_ok=True)
        if not file.exists() and any(work.iterdir()):
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


def _sync(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on the disk: a rename may outlive a power cut that the bytes do not."""
    for path in paths:
        if path.is_dir() and os.name == "nt":
            continue  # folders cannot be opened there
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
