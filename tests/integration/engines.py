"""Running things in the environment of an engine, and starting and surely ending its servers."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "engine_scripts"
ENVIRONMENTS = ROOT / ".engines"
REQUESTED = os.environ.get("DELTA_LLAVA_ENGINES", "").split()


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test where `make test-engines` was not asked for the environment `name`."""
    reason = f"needs an environment of its own: make test-engines ENGINES={name}"
    return pytest.mark.skipif(name not in REQUESTED, reason=reason)


class Engine:
    """The environment `.engines/NAME`."""

    def __init__(self, name: str, scratch: Path):
        self.name, self.scratch = name, scratch
        self.python = ENVIRONMENTS / name / "bin" / "python"
        assert self.python.exists(), f"make test-engines ENGINES={name} builds {self.python.parents[1]}"

    def environment(self, **more: str) -> dict[str, str]:
        """The caller's, without its Python paths, offline, with a cache of remote code that starts empty."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_", "PYTEST"))}
        own = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.scratch / "hf"),
            "HF_MODULES_CACHE": str(self.scratch / "modules"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return {**kept, **own, **more}

    def run(self, script: str, *arguments: object, stdin: object = None, timeout: int = 1200, **environment: str):
        """Run one of `engine_scripts/` and return the JSON object that it prints."""
        given = None if stdin is None else json.dumps(stdin)
        output = self.run_python(SCRIPTS / script, *arguments, stdin=given, timeout=timeout, **environment)
        return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))

    def run_python(self, *arguments: object, stdin: str | None = None, timeout: int = 600, **environment: str) -> str:
        """Run this environment's Python and return what it prints; fail with the end of it where it fails."""
        result = subprocess.run(
            [str(self.python), *map(str, arguments)],
            input=stdin,
            env=self.environment(**environment),
            cwd=self.scratch,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-12000:]}"
        return result.stdout

    @contextlib.contextmanager
    def serve(
        self, command: list[object], port: int, timeout: int = 600, health: str = "/health", **environment: str
    ) -> Iterator["Server"]:
        """Start `python COMMAND` of this environment, wait until `health` answers, and end all its processes after."""
        log = self.scratch / f"{self.name}-{port}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(self.python), *map(str, command)],
                env=self.environment(**environment),
                cwd=self.scratch,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its workers can be ended with it
            )
        server = Server(f"http://127.0.0.1:{port}", process, log, health)
        try:
            server.wait(timeout)
            yield server
        finally:
            server.stop()


class Server:
    """A running server: its address, its process, its log, and what answers when it is well."""

    def __init__(self, url: str, process: subprocess.Popen, log: Path, health: str):
        self.url, self.process, self.log, self.health = url, process, log, health

    @property
    def is_alive(self) -> bool:
        """Whether the process runs and says that it is healthy."""
        if self.process.poll() is not None:
            return False
        try:
            return urllib.request.urlopen(self.url + self.health, timeout=10).status == 200
        except OSError:
            return False

    def wait(self, timeout: int) -> None:
        """Return when the server is up; fail with the end of its log if it ends or takes too long."""
        end = time.monotonic() + timeout
        while not self.is_alive:
            ended = self.process.poll() is not None
            assert not ended and time.monotonic() < end, f"{self.log.read_text()[-8000:]}\nthe server did not start"
            time.sleep(0.5)

    def stop(self) -> None:
        """End the server and every process that it started."""
        for number, timeout in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)

    def get(self, path: str, timeout: int = 60) -> str:
        """Text of the answer to a GET."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            return response.read().decode()

    def post(self, path: str, body: bytes, timeout: int = 60) -> tuple[int, str]:
        """Status and text of the answer to a POST of `body`, whatever it is."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")


def data_url(image: str) -> str:
    """A PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"


def messages(case: dict) -> list[dict]:
    """The case's content as a user message of the OpenAI API."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(item["url"])}} if item["type"] == "image" else item
        for item in case["content"]
    ]
    return [{"role": "user", "content": content}]


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
