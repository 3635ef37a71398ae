"""Push a repo folder to the Hub in one commit."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from ..utils.errors import CONNECTION_ERRORS, DeltaLlavaError, causes, describe_hub_error, format_names, one_line
from ..utils.files import check_repo_id
from .repo_files import WEIGHTS, check_repo, repo_files


# About ten minutes in all, of which a restart of the Hub or of a router needs two or three.
ATTEMPTS = 24
LONGEST_WAIT = 30.0


@dataclass(frozen=True)
class PushReport:
    """Result of `push_folder`.

    Attributes:
        repo_id: where the files are.
        url: of the commit or of the pull request; empty after a dry run.
        files: size in bytes of every file, by its path in the repo.
        left_out: files of the folder that a model repo does not have and `include` does not name.
    """

    repo_id: str
    url: str
    files: dict[str, int]
    left_out: list[str] = field(default_factory=list)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    include: Sequence[str] = (),
    api: HfApi | None = None,
    initial_backoff: float = 1.0,
    timeout: float = 180.0,
    on_message: Callable[[str], None] = lambda message: None,
) -> PushReport:
    """Publish a repo folder that loads, in one commit.

    An attempt that fails on the way is followed by another, after growing pauses. Another attempt, or another call,
    uploads only what the Hub does not have yet. At the end the files of the commit are compared with the folder's, hash
    by hash. Weight files of the repo that the folder does not have are deleted in the same commit.

    Args:
        folder: the repo folder, as `convert_checkpoint` or the trainer wrote it.
        repo_id: `owner/name`; created if it does not exist.
        private: create it private. A repo that exists and is public is refused.
        revision: branch to commit to, created if it does not exist; by default `main`.
        create_pr: open a pull request with the commit. One that is open with the same files is not opened again.
        dry_run: check the folder and list what would be uploaded; nothing is sent.
        include: shell patterns of files to publish although a model repo does not have such (images, logs).
        api: the Hub to talk to; by default the one, and the login, of the environment.
        initial_backoff: seconds before the second attempt; they double, up to half a minute.
        timeout: seconds without an answer after which a connection counts as broken.
        on_message: called with each sentence that the user should read.

    Raises:
        DeltaLlavaError: one sentence on why it was not published.
    """
    folder = Path(folder).resolve()
    check_repo_id(repo_id)
    files, left_out = repo_files(folder, include)
    check_repo(folder)
    readme = files.get("README.md")
    if readme is None or repo_id not in readme.read_text(encoding="utf-8", errors="replace"):
        on_message(f"README.md does not name {repo_id}, so its examples may not run as they stand.")
    if left_out:
        # Of folders only the name: the trainer's checkpoints hold dozens of files each.
        names = {name if "/" not in name else f"{name.partition('/')[0]}/" for name in left_out}
        on_message(
            f"Not published, because a model repo has no such files: {format_names(names)}; `include=...` publishes them."
        )
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if dry_run:
        return PushReport(repo_id, "", sizes, left_out)

    upload = _Upload(
        api or HfApi(),
        repo_id,
        private,
        revision,
        create_pr,
        [CommitOperationAdd(name, str(path)) for name, path in files.items()],
    )
    wait = initial_backoff
    for attempt in range(1, ATTEMPTS + 1):
        # huggingface_hub waits for an answer for ever, and retries uploads, but neither the commit nor what precedes it.
        get_session().timeout = timeout
        try:
            return PushReport(repo_id, upload.run(), sizes, left_out)
        except DeltaLlavaError:
            raise
        except Exception as error:  # an unexpected answer may raise anything
            if attempt == ATTEMPTS or not _is_transient(error):
                message = f"{repo_id} is not complete on the Hub; push again to continue"
                raise describe_hub_error(error, repo_id, message) from error
            reason = one_line(describe_hub_error(error, repo_id, "Pushing failed"))
        on_message(f"{reason}; attempt {attempt + 1} of {ATTEMPTS} begins in {wait:g} s.")
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError  # the last attempt returns or raises


def check_login() -> None:
    """Refuse to begin a long job whose result could not be pushed.

    Raises:
        DeltaLlavaError: saying how to log in, or that the Hub cannot be reached.
    """
    try:
        HfApi().whoami()
    except Exception as error:  # an unexpected answer may raise anything
        message = "The Hub cannot be asked whether you may upload; try again"
        raise describe_hub_error(error, "an upload", message) from error


@dataclass(frozen=True)
class _Upload:
    """What goes where. An attempt uses copies of the operations: huggingface_hub notes in them how far it came."""

    api: HfApi
    repo_id: str
    private: bool
    branch: str | None
    create_pr: bool
    operations: list[CommitOperationAdd]

    def run(self) -> str:
        """One attempt, which may continue where an earlier one stopped; returns the URL of the commit or pull request."""
        api, repo_id = self.api, self.repo_id
        api.create_repo(repo_id, private=self.private or None, exist_ok=True)
        if self.private and not api.repo_info(repo_id).private:
            raise DeltaLlavaError(f"{repo_id} exists and is public; make it private, or leave `private=True` out.")
        if self.branch is not None and not self.create_pr:
            api.create_branch(repo_id, branch=self.branch, exist_ok=True)
        revision, url = (self.create_pr and self._find_pull_request()) or self._commit()
        self._compare(revision)
        return url

    @property
    def title(self) -> str:
        """Of the commit: the same for the same files, by which a pull request is known."""
        lines = "".join(f"{o.path_in_repo}:{o.upload_info.sha256.hex()}\n" for o in self.operations)
        return f"Upload {self.repo_id.split('/')[1]} ({hashlib.sha256(lines.encode()).hexdigest()[:12]})"

    def _find_pull_request(self) -> tuple[str, str] | None:
        """(revision, URL) of an open pull request with these files: an earlier attempt may have opened it."""
        opened = self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open")
        for discussion in opened:
            if discussion.title == self.title:
                return discussion.git_reference or f"refs/pr/{discussion.num}", discussion.url
        return None

    def _commit(self) -> tuple[str, str]:
        """Upload what the Hub lacks, and commit; a commit of unchanged files is skipped by huggingface_hub."""
        names = {operation.path_in_repo for operation in self.operations}
        # Weights of an earlier model, which would be loaded in place of the new ones, or stay beside them.
        stale = [name for name in self._tree(self.branch) if fnmatch(name, WEIGHTS) and name not in names]
        commit = self.api.create_commit(
            self.repo_id,
            [*map(copy.copy, self.operations), *map(CommitOperationDelete, stale)],
            commit_message=self.title,
            revision=self.branch,
            create_pr=self.create_pr,
        )
        return commit.pr_revision or commit.oid, commit.pr_url or commit.commit_url

    def _tree(self, revision: str | None) -> dict[str, str]:
        """Hash of every file of the repo, by path: sha256 of large files, git's own of the others."""
        entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        return {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in entries if isinstance(e, RepoFile)}

    def _compare(self, revision: str) -> None:
        tree = self._tree(revision)
        differing = [o.path_in_repo for o in self.operations if tree.get(o.path_in_repo) not in _hashes(o)]
        if differing:
            raise DeltaLlavaError(
                f"{self.repo_id} does not hold what was uploaded, in {format_names(differing, limit=5)}: did the files "
                "change, or does a .gitignore in the repo leave them out? Push again."
            )


def _hashes(operation: CommitOperationAdd) -> set[str]:
    """The two hashes by which the Hub may list a file."""
    hashes = {operation.upload_info.sha256.hex()}
    if operation.upload_info.size <= 100_000_000:  # the Hub keeps no larger file in git
        content = Path(str(operation.path_or_fileobj)).read_bytes()
        hashes.add(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    return hashes


def _is_transient(error: Exception) -> bool:
    """Whether another attempt could go better: the server failed or the connection broke."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code >= 500 or cause.response.status_code in (408, 425, 429)
        if isinstance(cause, CONNECTION_ERRORS):
            return not isinstance(cause, OfflineModeIsEnabled)
    # hf_xet raises plain RuntimeErrors, the JSON parser a ValueError on half an answer.
    return type(error) is RuntimeError or isinstance(error, json.JSONDecodeError)
