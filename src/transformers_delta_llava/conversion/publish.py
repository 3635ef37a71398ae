"""A repo folder goes to the Hub: complete, in one commit, over a connection that may break."""

import copy
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from .errors import ConversionError, listed
from .hub import is_repo_id
from .repo_check import check_repo, repo_files


# Weights of an earlier model that would be loaded in place of, or stay beside, the new ones.
WEIGHTS = "model*.safetensors*"
ATTEMPTS = 8
LONGEST_WAIT = 60.0
# The client waits for ever by default. A commit of many files may take a minute to be answered.
SILENCE = 180.0
# HTTP errors that another attempt may not see again; all above 499 besides.
_TRANSIENT = {408, 425, 429}
# Errors of the HTTP library that huggingface_hub uses, whichever it is.
_CONNECTION_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)
_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *_CONNECTION_ERRORS)

Talk = Callable[[str], None]


@dataclass(frozen=True)
class PushReport:
    """Result of `push_folder`.

    Attributes:
        repo_id: where the files are.
        url: of the commit or of the pull request; empty after a dry run.
        files: size in bytes of every file, by its path in the repo.
        attempts: how often the upload was begun; 0 after a dry run.
    """

    repo_id: str
    url: str
    files: dict[str, int]
    attempts: int


@dataclass(frozen=True)
class _Upload:
    """What goes where. The operations are templates: each attempt works on copies, which keep the hashes."""

    repo_id: str
    private: bool
    revision: str | None
    create_pr: bool
    title: str
    operations: list[CommitOperationAdd]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    api: HfApi | None = None,
    first_wait: float = 1.0,
    silence: float = SILENCE,
    talk: Talk = lambda sentence: None,
) -> PushReport:
    """Publish a repo folder that loads, in one commit.

    What fails on the way is tried again with growing pauses. Another attempt, or another call, uploads only what the
    Hub does not have yet. At the end the files of the commit are compared with the folder's, hash by hash. Weight files
    of the repo that the folder does not have are deleted in the same commit.

    Args:
        folder: the repo folder, as `convert_checkpoint` or the trainer wrote it.
        repo_id: `owner/name`; created if it does not exist.
        private: create it private. A repo that exists and is public is refused.
        revision: branch to commit to, made if it does not exist; by default `main`.
        create_pr: open a pull request with the commit. One that is open with the same files is not opened again.
        dry_run: check the folder and say what would be uploaded; nothing is sent.
        api: the Hub to talk to; by default the one, and the login, of the environment.
        first_wait: seconds before the second attempt; they double, up to a minute.
        silence: seconds without an answer after which a connection counts as broken.
        talk: gets a sentence on each thing worth knowing.

    Raises:
        ConversionError: one sentence on why it was not published.
    """
    folder = Path(folder).resolve()
    if not is_repo_id(repo_id):
        raise ConversionError(f"{repo_id} is not a Hub id of the form owner/name.")
    files = repo_files(folder)
    check_repo(folder)
    readme = files.get("README.md")
    if readme is None or repo_id not in readme.read_text(encoding="utf-8", errors="replace"):
        talk(f"README.md does not name {repo_id}, so its examples may not run as they stand.")
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if dry_run:
        return PushReport(repo_id, "", sizes, attempts=0)

    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    digest = hashlib.sha256("".join(f"{o.path_in_repo}:{_sha256(o)}\n" for o in operations).encode()).hexdigest()
    title = f"Upload {repo_id.split('/')[1]} ({digest[:12]})"
    upload = _Upload(repo_id, private, revision, create_pr, title, operations)
    api, wait = api or HfApi(), first_wait
    for attempt in range(1, ATTEMPTS + 1):
        get_session().timeout = silence
        try:
            return PushReport(repo_id, _attempt(upload, api, talk), sizes, attempt)
        except ConversionError:
            raise
        except _ERRORS as error:
            if attempt == ATTEMPTS or not _may_pass(error):
                raise _explain(error, repo_id) from error
            talk(f"Attempt {attempt} of {ATTEMPTS} broke off ({_first_line(error)}); the next one in {wait:g} s.")
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError  # the last attempt returns or raises


def check_login(api: HfApi | None = None) -> None:
    """Refuse to begin a long job whose result could not be pushed; ConversionError says how to log in."""
    try:
        (api or HfApi()).whoami()
    except _ERRORS as error:
        raise _explain(error, "the Hub") from error


def _attempt(upload: _Upload, api: HfApi, talk: Talk) -> str:
    """Do all that is still to be done; returns the URL of the commit or of the pull request."""
    repo_id, branch = upload.repo_id, upload.revision
    api.create_repo(repo_id, private=upload.private or None, exist_ok=True)
    if upload.private and not api.repo_info(repo_id).private:
        raise ConversionError(f"{repo_id} exists and is public; make it private, or push without --private.")
    if branch is not None and not upload.create_pr:
        api.create_branch(repo_id, branch=branch, exist_ok=True)

    # An answer that got lost: the commit or the pull request may be there already. A commit of unchanged files is none,
    # which create_commit sees to; a pull request has to be looked for.
    opened = next(_pull_requests(upload, api), None) if upload.create_pr else None
    if opened is not None:
        talk(f"Pull request {opened[0]} has these files already.")
        _compare(upload, _tree(api, repo_id, opened[0]))
        return opened[1]

    additions = [copy.copy(operation) for operation in upload.operations]
    names = {operation.path_in_repo for operation in additions}
    stale = [name for name in _tree(api, repo_id, branch) if fnmatch(name, WEIGHTS) and name not in names]
    api.preupload_lfs_files(repo_id, additions, revision=branch, create_pr=upload.create_pr, free_memory=False)
    commit = api.create_commit(
        repo_id,
        [*additions, *map(CommitOperationDelete, stale)],
        commit_message=upload.title,
        revision=branch,
        create_pr=upload.create_pr,
    )
    _compare(upload, _tree(api, repo_id, commit.pr_revision or commit.oid))
    return commit.pr_url or commit.commit_url


def _pull_requests(upload: _Upload, api: HfApi) -> Iterator[tuple[str, str]]:
    """(revision, URL) of the open pull requests with this upload's title, and so with its files."""
    for discussion in api.get_repo_discussions(
        upload.repo_id, discussion_type="pull_request", discussion_status="open"
    ):
        if discussion.title == upload.title:
            yield discussion.git_reference or f"refs/pr/{discussion.num}", discussion.url


def _tree(api: HfApi, repo_id: str, revision: str | None) -> dict[str, str]:
    """Hash of every file of the repo, by path: sha256 of large files, git's own of the others."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in entries if isinstance(e, RepoFile)}


def _compare(upload: _Upload, tree: dict[str, str]) -> None:
    differing = [
        o.path_in_repo for o in upload.operations if tree.get(o.path_in_repo) not in (_sha256(o), _git_hash(o))
    ]
    if differing:
        raise ConversionError(
            f"{upload.repo_id} does not hold what was uploaded, in {listed(differing, limit=5)}: did the files change, "
            "or does a .gitignore in the repo leave them out? Push again."
        )


def _sha256(operation: CommitOperationAdd) -> str:
    return operation.upload_info.sha256.hex()


def _git_hash(operation: CommitOperationAdd) -> str:
    if operation.upload_info.size > 100_000_000:  # the Hub keeps no such file in git
        return ""
    content = Path(str(operation.path_or_fileobj)).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _may_pass(error: Exception) -> bool:
    """Whether another attempt could go better: the server stumbled or the connection broke."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code >= 500 or cause.response.status_code in _TRANSIENT
        if isinstance(cause, _CONNECTION_ERRORS):
            return not isinstance(cause, OfflineModeIsEnabled)
    # hf_xet's errors are plain RuntimeErrors; a server's answer in half is a ValueError of the JSON parser.
    return type(error) is RuntimeError or isinstance(error, json.JSONDecodeError)


def _explain(error: Exception, target: str) -> ConversionError:
    status = next((c.response.status_code for c in _causes(error) if isinstance(c, HfHubHTTPError)), None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return ConversionError(f"The Hub wants a login for {target}: run `hf auth login`, or set HF_TOKEN.")
    if status == 403:
        return ConversionError(f"The Hub's answer for {target} is 403: your token may not write there.")
    return ConversionError(
        f"{target} is not complete on the Hub ({_first_line(error)}); push again to go on from here."
    )


def _first_line(error: Exception) -> str:
    """What went wrong at the bottom, without the query of a URL: that of an upload holds a signature."""
    reason = str(next((c for c in _causes(error) if isinstance(c, (HfHubHTTPError, *_CONNECTION_ERRORS))), error))
    return re.sub(r"\?\S*", "", next(iter(reason.strip().splitlines()), "") or type(error).__name__).rstrip(".")[:200]
