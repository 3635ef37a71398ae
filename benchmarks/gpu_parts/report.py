"""What a part knows and writes: its time, its device, and rows that are on disk the moment they exist."""

import argparse
import importlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from harness import machine, timed

from . import NO_DEVICE, PARTS, write_json


SEED = 0


class Report:
    """Rows, errors and facts of one part, written to `NAME.json` after each change.

    Attributes:
        rehearse: whether shapes are tiny and the device is the CPU.
        device: `"cuda"`, or `"cpu"` in a rehearsal.
        content: what is written.
    """

    def __init__(self, name: str, output: Path, rehearse: bool, seconds: float):
        self.path, self.rehearse, self.device = output / f"{name}.json", rehearse, "cpu" if rehearse else "cuda"
        self.deadline = time.monotonic() + seconds
        options = argparse.Namespace(device=self.device, dtype="bfloat16", threads=torch.get_num_threads())
        self.content: dict[str, Any] = {
            "part": name,
            "status": "running",
            "rehearsal": rehearse,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "command": f"python benchmarks/on_gpu.py OUT --parts {name}" + (" --rehearse" if rehearse else ""),
            "seed": SEED,
            **machine(options),
            "cuda": torch.version.cuda,
            "rows": [],
            "errors": [],
            "left_out": [],
        }
        self.write()

    def left(self) -> float:
        """Seconds until the part should have ended."""
        return self.deadline - time.monotonic()

    def add(self, **row: Any) -> None:
        """One more row."""
        self.content["rows"].append(row)
        self.write()

    def note(self, **facts: Any) -> None:
        """What holds for all rows."""
        self.content |= facts
        self.write()

    def attempt(self, what: str, measure: Callable[[], Any], seconds: float = 0.0) -> Any:
        """What `measure` returns; an error is written down instead of raised, and `None` comes back.

        Args:
            what: a name for it.
            measure: to be called.
            seconds: that it needs at least; with less time left it is left out, which is written down too.
        """
        if not self.rehearse and self.left() < seconds:
            self.content["left_out"].append(what)
            return self.write()
        try:
            return measure()
        except Exception as error:
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.content["errors"].append({"what": what, "error": text[:500]})
            self.write()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return None

    def write(self) -> None:
        """All of it, to the file."""
        write_json(self.path, self.content)


def run_part(name: str, output: Path, rehearse: bool) -> None:
    """Import a part, wait for the line that says how many seconds it has, run it."""
    part = getattr(importlib.import_module(f"gpu_parts.{PARTS[name].module}"), name)
    line = sys.stdin.readline()
    if not rehearse and not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    if line:  # else who started this is gone
        torch.manual_seed(SEED)
        if rehearse:
            torch.set_num_threads(1)
        part(Report(name, output, rehearse, float(line)))


# ---------------------------------------------------------------------------- measuring


def milliseconds(functions: dict[str, Any], device: str, seconds: float = 0.2, most: int = 100) -> dict[str, float]:
    """Median time of each, called in turns after two rounds of warm-up; as many rounds as fit into `seconds`, 3 at least."""
    for _ in range(2):
        once = sum(timed(function, device) for function in functions.values())
    rounds = min(most, max(3, round(seconds / max(once, 1e-6))))
    times: dict[str, list[Any]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if device == "cpu":
                times[name].append(1000 * timed(function, device))
            else:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                times[name].append((start, end))
    if device != "cpu":
        torch.cuda.synchronize()
        times = {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in times.items()}
    return {name: statistics.median(values) for name, values in times.items()}


def measured_rates(report: Report, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """What the device reaches: FLOP/s of a large matrix product, bytes/s of a large copy, read and written; on random numbers."""
    size = 256 if report.rehearse else 8192
    left, right = (torch.randn(size, size, device=report.device, dtype=dtype) for _ in range(2))
    product = torch.empty(size, size, device=report.device, dtype=dtype)
    source = torch.randint(100, (1 << 12 if report.rehearse else 1 << 29,), device=report.device)  # 4 GiB
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(left, right, out=product), "copy": lambda: target.copy_(source)}
    times = milliseconds(calls, report.device)
    rates = {"flops_per_second": 2 * size**3 / times["product"], "bytes_per_second": 2 * source.nbytes / times["copy"]}
    return {name: 1000 * rate for name, rate in rates.items()}


def captured(function: Any, device: str) -> Any:
    """A function that replays a CUDA graph of `function`, after warm-up on a stream of its own; on the CPU the function itself.

    What `function` reads and writes must stay where it is, and it must not wait for the device.
    """
    if device == "cpu":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def peak_gigabytes(report: Report) -> float | None:
    """Most that was allocated since the last call, weights and all; nothing on the CPU."""
    if report.device == "cpu":
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak
