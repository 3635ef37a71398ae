"""Folders named by path or by Hub id."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .errors import DeltaLlavaError, one_line
from .files import refuse_special_files


_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
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
    return _REPO_ID.fullmatch(text) is not None


def cached_repo_id(path: str) -> str | None:
    """The Hub id of a path into the Hub's cache, on whatever machine; None for any other path."""
    match = _CACHED.fullmatch(path) if len(path) <= _LONGEST_PATH else None
    return f"{match[1]}/{match[2]}" if match else None


def public_name(spec: str) -> str:
    """A name that may be published: a Hub id as it is, of a path only its last part that says something."""
    if is_repo_id(spec) and not Path(spec).exists():
        return spec
    path = Path(spec).resolve()
    if cached := cached_repo_id(str(path)):
        return cached
    named = (part.name for part in (path, *path.parents) if not _COMMIT.fullmatch(part.name))
    return next(name for name in named if name != "snapshots")


def hub_id_of(name: object, *folders: Path) -> str | None:
    """The Hub id that a checkpoint says it was made of, in a form that may be published.

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
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    if not is_repo_id(name) or any((folder / name).exists() for folder in (Path(), *folders)):
        return None
    owner, _, last = name.partition("/")
    is_path = _FOLDER.fullmatch(owner) or _COMMIT.fullmatch(last) or last.startswith("checkpoint-")
    return None if is_path else name


def local_folder(spec: str, what: str, patterns: tuple[str, ...], option: str | None = None) -> Path:
    """The folder at `spec`, or a download of those files of the Hub repo `spec` that match `patterns`.

    Args:
        spec: a folder or a Hub id.
        what: what it is meant to be, for the error message.
        patterns: shell patterns of the files to download.
        option: of the command line that gives it, for the error message.

    Raises:
        DeltaLlavaError: `spec` is neither a folder nor a repo that can be reached, or a pipe or device lies in it.
    """
    if Path(spec).is_dir():
        refuse_special_files(Path(spec))
        return Path(spec)
    if not is_repo_id(spec):
        remedy = f"; pass its folder or Hub id with {option}" if option else ""
        raise DeltaLlavaError(f"The {what} {spec} is not a folder, and not a Hub id (owner/name) either{remedy}.")
    try:
        return Path(snapshot_download(spec, allow_patterns=list(patterns)))
    except Exception as error:  # an odd answer may raise anything
        reason = one_line(str(error).strip().split("\n")[0])
        raise DeltaLlavaError(
            f"The {what} {spec} is not a folder here, and could not be had from the Hub ({reason}); "
            f"pass the path of a local copy{f' with {option}' if option else ''}."
        ) from error
