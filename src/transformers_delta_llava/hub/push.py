"""Push a repo folder to the Hub in one commit."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError

from ..utils.errors import DeltaLlavaError, format_names
from ..utils.files import is_repo_id
from .repo_files import check_repo, repo_files
from .retries import SILENCE, Patience, Talk, explain


# Errors of the HTTP library that huggingface_hub uses, whichever it is.
_CONNECTION_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)


# Weights of an earlier model that would be loaded in place of, or stay beside, the new ones.
WEIGHTS = "model*.safetensors*"


@dataclass(frozen=True)
class PushReport:
    """Result of `push_folder`.

    Attributes:
        repo_id: where the files are.
        url: of the commit or of the pull request; empty after a dry run.
        files: size in bytes of every file, by its path in the repo.
        retries: how many steps had to be made again.
        left_out: files of the folder that a model repo does not have and `include` does not name.
    """

    repo_id: str
    url: str
    files: dict[str, int]
    retries: int
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Upload:
    """What goes where. The operations are templates, copies of which keep the hashes."""

    repo_id: str
    private: bool
    revision: str | None
    create_pr: bool
    title: str
    operations: list[CommitOperationAdd]

    def additions(self) -> list[CommitOperationAdd]:
        """Fresh operations: huggingface_hub notes in them how far it came."""
        return [copy.copy(operation) for operation in self.operations]


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
        include: shell patterns of files to publish although a model repo does not have such (images, logs).
        api: the Hub to talk to; by default the one, and the login, of the environment.
        first_wait: seconds before the second attempt; they double, up to half a minute.
        silence: seconds without an answer after which a connection counts as broken.
        talk: gets a sentence on each thing worth knowing.

    Raises:
        DeltaLlavaError: one sentence on why it was not published.
    """
    folder = Path(folder).resolve()
    if not is_repo_id(repo_id):
        raise DeltaLlavaError(f"{repo_id} is not a Hub id of the form owner/name.")
    files, left_out = repo_files(folder, include)
    check_repo(folder)
    readme = files.get("README.md")
    if readme is None or repo_id not in readme.read_text(encoding="utf-8", errors="replace"):
        talk(f"README.md does not name {repo_id}, so its examples may not run as they stand.")
    if left_out:
        # Of folders only the name: the trainer's checkpoints hold dozens of files each.
        names = {name if "/" not in name else f"{name.partition('/')[0]}/" for name in left_out}
        talk(
            f"Left out, because a model repo has no such files: {format_names(names)}; --include publishes them, too."
        )
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if dry_run:
        return PushReport(repo_id, "", sizes, retries=0, left_out=left_out)

    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    digest = hashlib.sha256("".join(f"{o.path_in_repo}:{_sha256(o)}\n" for o in operations).encode()).hexdigest()
    title = f"Upload {repo_id.split('/')[1]} ({digest[:12]})"
    upload = _Upload(repo_id, private, revision, create_pr, title, operations)
    patiently = Patience(repo_id, first_wait, silence, talk)
    url = _upload(upload, api or HfApi(), patiently)
    return PushReport(repo_id, url, sizes, patiently.retries, left_out)


def check_login() -> None:
    """Refuse to begin a long job whose result could not be pushed.

    Raises:
        DeltaLlavaError: saying how to log in, or that the Hub cannot be reached.
    """
    try:
        HfApi().whoami()
    except Exception as error:  # an odd answer may raise anything
        raise explain(error, "an upload", "The Hub cannot be asked whether you may upload; try again") from error


def _upload(upload: _Upload, api: HfApi, patiently: Patience) -> str:
    """Do what is still to be done, step by step; returns the URL of the commit or of the pull request."""
    repo_id, branch = upload.repo_id, upload.revision
    patiently("Creating the repo", lambda: api.create_repo(repo_id, private=upload.private or None, exist_ok=True))
    if upload.private and not patiently("Looking at the repo", lambda: api.repo_info(repo_id)).private:
        raise DeltaLlavaError(f"{repo_id} exists and is public; make it private, or push without --private.")
    if branch is not None and not upload.create_pr:
        patiently("Creating the branch", lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    additions = upload.additions()

    def send() -> None:
        api.preupload_lfs_files(repo_id, additions, revision=branch, create_pr=upload.create_pr, free_memory=False)

    opened = _opened(upload, api, patiently)
    if not opened:
        patiently("Uploading", send)
        opened = patiently("Committing", lambda: _commit(upload, api, patiently))
    revision, url = opened
    _compare(upload, patiently("Comparing", lambda: _tree(api, repo_id, revision)))
    return url


def _commit(upload: _Upload, api: HfApi, patiently: Patience) -> tuple[str, str]:
    """Commit, unless that was done and only the answer got lost; returns the revision and the URL.

    A commit of files that have not changed is none, which create_commit sees to. A pull request has to be looked for.
    """
    if opened := _opened(upload, api, patiently):
        return opened
    names = {operation.path_in_repo for operation in upload.operations}
    stale = [
        name for name in _tree(api, upload.repo_id, upload.revision) if fnmatch(name, WEIGHTS) and name not in names
    ]
    commit = api.create_commit(
        upload.repo_id,
        [*upload.additions(), *map(CommitOperationDelete, stale)],
        commit_message=upload.title,
        revision=upload.revision,
        create_pr=upload.create_pr,
    )
    return commit.pr_revision or commit.oid, commit.pr_url or commit.commit_url


def _opened(upload: _Upload, api: HfApi, patiently: Patience) -> tuple[str, str] | None:
    """Revision and URL of an open pull request with these files, where one is wanted and there is one."""
    if not upload.create_pr:
        return None
    return patiently("Looking for the pull request", lambda: next(_pull_requests(upload, api), None))


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
        raise DeltaLlavaError(
            f"{upload.repo_id} does not hold what was uploaded, in {format_names(differing, limit=5)}: did the files change, "
            "or does a .gitignore in the repo leave them out? Push again."
        )


def _sha256(operation: CommitOperationAdd) -> str:
    return operation.upload_info.sha256.hex()


def _git_hash(operation: CommitOperationAdd) -> str:
    if operation.upload_info.size > 100_000_000:  # the Hub keeps no such file in git
        return ""
    content = Path(str(operation.path_or_fileobj)).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
