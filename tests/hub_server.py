"""A small Hub over HTTP: keeps what it is sent in memory, and fails when a test tells it to.

It speaks what huggingface_hub uses to create a repo, upload (regular files and LFS), commit, open a pull request, list and
download. No Xet storage: clients must be told so with HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import HfApi


TOKEN = "hf_" + "t" * 34
LFS_FROM = 10_000  # bytes; the real Hub goes by name and size
EPOCH = "2026-01-01T00:00:00.000Z"
Tree = dict[str, bytes]
Answer = tuple[int, dict | list | bytes, dict[str, str]]
# What a fault does to a request: an answer of 500, of 429, none at all for too long, a connection cut in the middle of
# the request, or cut after the request was carried out.
FAULTS = ("500", "429", "stall", "cut", "lost")


class Faults:
    """Draws `total` faults from a seed; thread-safe. `done` lists (request, fault)."""

    def __init__(self, total: int, seed: int = 0, rate: float = 0.5, kinds: tuple[str, ...] = FAULTS) -> None:
        self.left, self.rate, self.kinds = total, rate, kinds
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.done: list[tuple[str, str]] = []

    def draw(self, request: str) -> str | None:
        with self.lock:
            if not self.left or self.random.random() >= self.rate:
                return None
            self.left -= 1
            self.done.append((request, self.random.choice(self.kinds)))
            return self.done[-1][1]


@dataclass
class Repo:
    """Commits by id, branches and pull requests by name."""

    private: bool
    commits: dict[str, Tree] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    titles: dict[int, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: Tree) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{branch}".encode()).hexdigest()
        self.commits[oid], self.heads[branch] = tree, oid
        return oid

    def oid(self, revision: str) -> str | None:
        return self.heads.get(revision, revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    """Runs in threads of this process between `with` and its end; `url` is its endpoint."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, faults: Faults | None = None, stall: float = 0.6) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults, self.stall = faults, stall
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.ignored: set[str] = set()  # what a .gitignore leaves out
        self.requests: Counter[str] = Counter()  # "PUT /lfs/..." and so on
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def api(self, token: str | bool = TOKEN) -> HfApi:
        return HfApi(endpoint=self.url, token=token)

    def files(self, repo_id: str, revision: str = "main") -> Tree:
        """Content of every file, by path, but of the one that every new repo has."""
        repo = self.repos[repo_id]
        return {name: data for name, data in repo.commits[repo.heads[revision]].items() if name != ".gitattributes"}

    @property
    def uploads(self) -> dict[str, int]:
        """How often each large file was sent."""
        return {request: count for request, count in self.requests.items() if request.startswith("PUT")}

    @property
    def num_commits(self) -> int:
        return sum(count for request, count in self.requests.items() if "/commit/" in request)

    def handle_error(self, *_: object) -> None:
        """Connections that a test cut are not reported."""


class NotFound(Exception):
    """The code by which the Hub names what is missing."""


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.url_path, self.query = unquote(parts.path), parse_qs(parts.query)
        request = f"{self.command} {self.url_path}"
        fault = self.server.faults.draw(request) if self.server.faults else None
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(min(1000, length) if fault == "cut" else length)
        if fault == "cut":
            return self._hang_up()
        if fault == "stall":
            threading.Event().wait(self.server.stall)
            return self._hang_up()
        if fault and fault.isdigit():
            return self._send(int(fault), {"error": "a fault of the test"}, {})
        with self.server.lock:
            self.server.requests[request] += 1
            answer = self._answer(body)
        return self._hang_up() if fault == "lost" else self._send(*answer)

    def _hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: dict | list | bytes, headers: dict[str, str]) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, body: bytes) -> Answer:
        if not self.url_path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "no token, or a wrong one"}, {}
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.url_path}"):
                try:
                    return method(self, body, *match.groups())
                except NotFound as error:
                    return 404, {"error": "not found"}, {"X-Error-Code": str(error)}
        return 404, {"error": f"no such thing: {self.command} {self.url_path}"}, {}

    def _whoami(self, body: bytes) -> Answer:
        return 200, {"type": "user", "name": "org", "orgs": [], "auth": {}}, {}

    def _create(self, body: bytes) -> Answer:
        request = json.loads(body)
        repo_id = f"{request['organization']}/{request['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "id": repo_id, "name": repo_id}
        if repo_id in self.server.repos:
            return 409, {"error": "You already created this model repo", **answer}, {}
        private = request.get("private") or request.get("visibility") == "private"
        self.server.repos[repo_id] = Repo(private=bool(private))
        self.server.repos[repo_id].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, answer, {}

    def _validate_yaml(self, body: bytes) -> Answer:
        return 200, {"errors": [], "warnings": []}, {}

    def _find(self, repo_id: str, revision: str) -> tuple[Repo, str]:
        """The repo, and the id of the commit."""
        repo = self.server.repos.get(repo_id)
        oid = repo and repo.oid(revision)
        if not repo or not oid:
            raise NotFound("RevisionNotFound" if repo else "RepoNotFound")
        return repo, oid

    def _info(self, body: bytes, repo_id: str, revision: str = "main") -> Answer:
        repo, oid = self._find(repo_id, revision)
        siblings = [{"rfilename": name} for name in repo.commits[oid]]
        return 200, {"id": repo_id, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}, {}

    def _branch(self, body: bytes, repo_id: str, branch: str) -> Answer:
        repo = self.server.repos[repo_id]
        if branch in repo.heads:
            return 409, {"error": "exists"}, {}
        repo.heads[branch] = repo.heads["main"]
        return 200, {}, {}

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> Answer:
        repo, oid = self._find(repo_id, revision)
        tree = repo.commits[oid]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LFS_FROM else "regular",
                "shouldIgnore": file["path"] in self.server.ignored,
                "oid": _oid(tree[file["path"]]) if file["path"] in tree else None,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}, {}

    def _batch(self, body: bytes, repo_id: str) -> Answer:
        return 200, {"transfer": "basic", "objects": [self._actions(o) for o in json.loads(body)["objects"]]}, {}

    def _actions(self, request: dict) -> dict:
        oid = request["oid"]
        if oid in self.server.objects:
            return request
        upload = {"href": f"{self.server.url}/lfs/{oid}?X-Signature=secret"}
        return {**request, "actions": {"upload": upload, "verify": {"href": f"{self.server.url}/lfs/{oid}/verify"}}}

    def _put(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "other bytes than announced"}, {}
        self.server.objects[oid] = body
        return 200, b"", {}

    def _verify(self, body: bytes, oid: str) -> Answer:
        return (200, {}, {}) if oid in self.server.objects else (404, {"error": "not uploaded"}, {})

    def _commit(self, body: bytes, repo_id: str, revision: str) -> Answer:
        repo = self.server.repos[repo_id]
        items = [json.loads(line) for line in body.splitlines()]
        tree = dict(repo.commits[repo.heads[revision]])
        for key, value in ((item["key"], item["value"]) for item in items):
            if key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return 400, {"error": f"{value['path']} was not uploaded"}, {}
                tree[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
        answer = {"pullRequestUrl": None}
        if "create_pr" in self.query:
            number = len(repo.titles) + 1
            repo.titles[number] = items[0]["value"]["summary"]
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{number}"
            revision = f"refs/pr/{number}"
        oid = repo.commit(revision, tree)
        return 200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid, **answer}, {}

    def _discussions(self, body: bytes, repo_id: str) -> Answer:
        common = {"author": {"name": "org"}, "createdAt": EPOCH, "status": "open", "isPullRequest": True}
        common["repo"] = {"name": repo_id, "type": "model"}
        titles = self.server.repos[repo_id].titles
        discussions = [{"title": title, "num": num, **common} for num, title in titles.items()]
        return 200, {"discussions": discussions, "count": len(discussions), "start": 0}, {}

    def _tree(self, body: bytes, repo_id: str, revision: str) -> Answer:
        repo, oid = self._find(repo_id, revision)
        return 200, [_entry(name, content) for name, content in repo.commits[oid].items()], {}

    def _resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> Answer:
        repo, oid = self._find(repo_id, revision)
        if name not in repo.commits[oid]:
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}
        content = repo.commits[oid][name]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{_oid(content)}"', "Content-Length": str(len(content))}
        return 200, content, headers


def _oid(content: bytes) -> str:
    """sha256 of a large file, git's hash of another."""
    if len(content) >= LFS_FROM:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
    if len(content) >= LFS_FROM:
        entry |= {"lfs": {"oid": _oid(content), "size": len(content), "pointerSize": 130}, "oid": "0" * 40}
    return entry


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    (r"GET /api/whoami-v2", _Handler._whoami),
    (r"POST /api/repos/create", _Handler._create),
    (r"POST /api/validate-yaml", _Handler._validate_yaml),
    (rf"GET /api/models/{_ID}", _Handler._info),
    (rf"GET /api/models/{_ID}/revision/(.+)", _Handler._info),
    (rf"POST /api/models/{_ID}/branch/(.+)", _Handler._branch),
    (rf"POST /api/models/{_ID}/preupload/(.+)", _Handler._preupload),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /lfs/(\w+)", _Handler._put),
    (r"POST /lfs/(\w+)/verify", _Handler._verify),
    (rf"POST /api/models/{_ID}/commit/(.+)", _Handler._commit),
    (rf"GET /api/models/{_ID}/discussions", _Handler._discussions),
    (rf"GET /api/models/{_ID}/tree/((?:refs/pr/)?[^/]+)", _Handler._tree),
    (rf"(?:GET|HEAD) /{_ID}/resolve/((?:refs/pr/)?[^/]+)/(.+)", _Handler._resolve),
]
