"""Work in forked children that may crash, hang or be killed, and hashes of what they leave."""

import hashlib
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def start(work: Callable[[], object]) -> tuple[int, int]:
    """Run `work` in a forked child; returns its process id, and a pipe that will hold its result as JSON."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        torch.set_num_threads(1)  # the threads of the parent are not here, and OpenMP would wait for them
        try:
            result = {"value": work()}
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            result = {"error": type(error).__name__, "handled": isinstance(error, (ValueError, OSError))}
            result |= {"text": " ".join(str(error).split()), "traceback": text}
        with os.fdopen(writing, "w") as pipe:
            json.dump(result, pipe)
    finally:
        os._exit(0)


def outcome(work: Callable[[], object], timeout: float) -> dict:
    """The result of `work` in a child: `value`, or `error` with its text; or `died` or `hung`."""
    child, pipe = start(work)
    deadline, parts = time.monotonic() + timeout, []
    with os.fdopen(pipe, "rb", buffering=0) as stream:
        while select.select([stream], [], [], max(0, deadline - time.monotonic()))[0]:
            part = stream.read(1 << 16)
            if not part:
                break
            parts.append(part)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"hung": timeout}
    status = os.waitpid(child, 0)[1]
    if not parts:
        return {"died": status}
    return json.loads(b"".join(parts))


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
