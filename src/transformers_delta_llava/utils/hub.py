"""Folders named by path or by Hub id."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from .errors import DeltaLlavaError, one_line
from .files import refuse_special_files


_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a Hub id, `owner/name`."""
    return _REPO_ID.fullmatch(text) is not None


def public_name(spec: str) -> str:
    """A name that may be published: a Hub id as it is, of a path only its last part."""
    return spec if is_repo_id(spec) and not Path(spec).exists() else Path(spec).resolve().name


def local_folder(spec: str, what: str, patterns: tuple[str, ...]) -> Path:
    """The folder at `spec`, or a download of those files of the Hub repo `spec` that match `patterns`.

    Args:
        spec: a folder or a Hub id.
        what: what it is meant to be, for the error message.
        patterns: shell patterns of the files to download.

    Raises:
        DeltaLlavaError: `spec` is neither a folder nor a repo that can be reached, or a pipe or device lies in it.
    """
    if Path(spec).is_dir():
        refuse_special_files(Path(spec))
        return Path(spec)
    if not is_repo_id(spec):
        raise DeltaLlavaError(f"The {what} {spec} is not a folder, and not a Hub id (owner/name) either.")
    try:
        return Path(snapshot_download(spec, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = one_line(str(error).strip().split("\n")[0])
        raise DeltaLlavaError(
            f"The {what} {spec} is not a folder here, and could not be had from the Hub ({reason}); "
            "pass the path of a local copy."
        ) from error
