"""Measures everything on one GPU, in parts, in nine minutes; nothing is downloaded, weights are random and made on the GPU.

    python benchmarks/on_gpu.py OUT
    python benchmarks/on_gpu.py OUT --parts projector correctness
    python benchmarks/on_gpu.py OUT --rehearse

Parts run in order of worth, each in a process of its own with its own time limit, and write OUT/PART.json after every row. So a crash,
memory that does not suffice or a cut at any moment costs the rest of one part. `--rehearse` runs every part on the CPU with tiny
shapes: it shows that the code runs, and its figures mean nothing. `make gpu-report FOLDER=OUT` renders what was measured.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from gpu_parts import NO_DEVICE, PARTS, write_json


ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".wheels"
LEAST = 5.0  # seconds that are worth starting a part for
Command = Callable[[str], list[str]]


def main() -> None:
    """Run the parts, or, as a child, one of them."""
    parser = argparse.ArgumentParser(description="Measure everything on one GPU, in parts.")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="all by default, in order"
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        from gpu_parts.report import run_part

        return run_part(arguments.child, arguments.output, arguments.rehearse)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that children end as well
    script = [sys.executable, str(Path(__file__).resolve()), str(arguments.output.resolve())]
    options = ["--rehearse"] if arguments.rehearse else []
    with tempfile.TemporaryDirectory() as site:
        statuses = run_parts(
            {
                name: PARTS[name].limit * (3 if arguments.rehearse else 1) for name in arguments.parts
            },  # CPUs may be busy
            lambda name: [*script, "--child", name, *options],
            arguments.output,
            arguments.seconds,
            environment(Path(site)),
        )
    if "no device" in statuses.values():
        print(
            "PyTorch finds no GPU here: nothing was measured. Use --rehearse to try the script on the CPU.",
            file=sys.stderr,
        )
        sys.exit(2)
    if set(statuses.values()) != {"done"}:
        sys.exit(1)


def environment(site: Path) -> dict[str, str]:
    """What the parts run in: this checkout's package, what wheels were carried along, no network."""
    for wheel in sorted(WHEELS.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    paths = [str(ROOT / "src"), str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_parts(
    limits: Mapping[str, float],
    command: Command,
    output: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run the parts one after the other; how each ended, by name: `done`, or what went wrong.

    While one part runs, the next one imports what it needs and waits. A child reads one line from its standard input: the seconds
    that it has. It writes its rows to `output/NAME.json` itself; how it ended is added here, whatever became of it.

    Args:
        limits: seconds of each part, in the order to run them.
        command: that runs the part of a name.
        output: folder for the results and `log.txt`, what the parts printed.
        seconds: for all parts together.
        environment: of the children; this process's own by default.
    """
    output.mkdir(parents=True, exist_ok=True)
    deadline, names = time.monotonic() + seconds, list(limits)
    statuses: dict[str, str] = {}
    children: list[Child] = []

    def start(index: int) -> None:
        if index < len(names):
            children.append(Child(command(names[index]), environment))

    for name in names:  # rows of an earlier run must not pass for this one's
        (output / f"{name}.json").unlink(missing_ok=True)
    (output / "log.txt").unlink(missing_ok=True)
    try:
        start(0)
        for index, name in enumerate(names):
            begun = time.monotonic()
            limit = min(limits[name], deadline - begun)
            if limit < LEAST:
                status, printed = "not started", ""
            else:
                children[index].go(limit)
                start(index + 1)
                status = children[index].wait(limit)
                printed = children[index].printed()
            if status == "no device":
                return {name: status}
            took = time.monotonic() - begun
            with (output / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"==== {name}: {status}, {took:.0f} s\n{printed}\n")
            statuses[name], line = finish(output / f"{name}.json", status, took, printed)
            print(line, flush=True)
    finally:
        for child in children:
            child.kill()
    return statuses


class Child:
    """A process of a part in a session of its own, so that those that it starts end with it."""

    def __init__(self, command: list[str], environment: Mapping[str, str] | None):
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=None if environment is None else dict(environment),
            start_new_session=True,
        )

    def go(self, seconds: float) -> None:
        """Let it begin, with a little less time than until it is killed."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died already, which `wait` reports
            self.process.stdin.write(f"{0.95 * seconds - 1:.1f}\n".encode())
            self.process.stdin.close()

    def wait(self, seconds: float) -> str:
        """How it ended within that time: `done`, `failed`, `no device` or `timed out`."""
        try:
            return {0: "done", NO_DEVICE: "no device"}.get(self.process.wait(seconds), "failed")
        except subprocess.TimeoutExpired:
            self.kill()
            return "timed out"

    def kill(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def printed(self) -> str:
        """What it printed so far."""
        self.output.seek(0)
        return self.output.read().decode("utf-8", "replace")


def finish(path: Path, status: str, seconds: float, printed: str) -> tuple[str, str]:
    """Write how a part ended into its results; its status, `with errors` where it was done but for some, and a line on it."""
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"part": path.stem, "rows": []}
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    problems = [f"{entry['what']}: {entry['error']}" for entry in report.get("errors", [])]
    problems += [f"{row['check']}: {row['value']:.2g}" for row in report["rows"] if row.get("ok") is False]
    if status == "failed":
        problems.append(lines[-1][:500] if lines else "it ended without a word")
    elif status == "done" and problems:
        status = "with errors"
    write_json(path, report | {"status": status, "seconds": round(seconds, 1), "problems": problems})
    line = f"{path.stem:<18} {status:<11} {seconds:>4.0f} s  {len(report['rows'])} rows"
    return status, line + (f"; {len(problems)} problems, the last: {problems[-1][:160]}" if problems else "")


if __name__ == "__main__":
    main()
