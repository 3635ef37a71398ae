"""A small Hub over HTTP that lists and serves the files of repos; what is sent to it is refused.

It has no Xet storage: clients must be told so with HF_HUB_DISABLE_XET=1.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


TOKEN = "hf_" + "t" * 34
_ID = r"([\w.-]+/[\w.-]+)"
COMMIT = "c" * 40


class HubServer(ThreadingHTTPServer):
    """Runs in a thread between `with` and its end; `url` is its endpoint, `repos` has the folder of each id."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Path] = {}

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _get(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(rf"/api/models/{_ID}(?:/(tree|revision)/([^/]+))?|/{_ID}/resolve/([^/]+)/(.+)", path)
        api_id, kind, revision, file_id, file_revision, name = match.groups() if match else [None] * 6
        if "/tree/" in path and match is None:  # there are no folders in these repos
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        folder = self.server.repos.get(api_id or file_id or "")
        if folder is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if (revision or file_revision or "main") not in ("main", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if name is None:
            files = [file for file in sorted(folder.iterdir()) if file.is_file()]
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            info = {"id": api_id, "sha": COMMIT, "private": False, "tags": []}
            info["siblings"] = [{"rfilename": file.name} for file in files]
            return self._send(200, json.dumps(tree if kind == "tree" else info).encode(), {})
        if not (folder / name).is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = (folder / name).read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": etag})

    do_GET = do_HEAD = _get

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
