"""What the benchmarks share: side-by-side timing, peak memory, the machine's own limit, and where results go.

Times of one comparison come from one run, in turns, so that whatever else the machine does hits all sides alike.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import transformers_delta_llava


RESULTS = Path(__file__).parents[1] / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# All that multiplies matrices in the models measured here, convolutions aside.
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.addmm_.default,
    torch.ops.aten.bmm.default,
}

Function = Callable[[], Any]


def arguments_of(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; `defaults` replaces some of their values."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch on the CPU")
    parser.add_argument("--seconds", type=float, default=6.0, help="time to spend on each comparison")
    parser.add_argument("--rounds", type=int, help="calls of each side, instead of as many as the time allows")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for one thread on a busy machine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plots")
    parser.set_defaults(**defaults)
    return parser


def prepare(arguments: argparse.Namespace) -> None:
    """Threads and random numbers as the options say."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)


# ---------------------------------------------------------------------------- measuring


def timed(function: Function, device: str = "cpu", clock: str = "wall") -> float:
    """Seconds of one call, with what it started on the device."""
    _synchronize(device)
    start = CLOCKS[clock]()
    function()
    _synchronize(device)
    return CLOCKS[clock]() - start


def side_by_side(functions: dict[str, Function], arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each function, called in turns after one round of warm-up, 3 to 50 rounds."""
    warm = sum(timed(function, arguments.device) for function in functions.values())
    rounds = arguments.rounds or min(50, max(3, round(arguments.seconds / warm)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function, arguments.device, arguments.clock))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(function: Function, device: str = "cpu") -> int:
    """Most memory that a call holds at a time, beyond what was held before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    events = run.profiler.kineto_results.events()
    held = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += size
        most = max(most, held)
    return most


def matmul(device: str, dtype: torch.dtype, size: int | None = None) -> tuple[Function, int]:
    """A product of two square matrices, large enough to reach the machine's peak, and its FLOPs."""
    size = size or (8192 if device.startswith("cuda") else 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right, 2 * size**3


def products_alone(function: Function) -> tuple[Function, int]:
    """The matrix products of a call, shapes and strides alike, without all that happens between them; and their FLOPs.

    As long as a function calls PyTorch for its products, it cannot be faster than that.
    """
    calls: list[tuple[Any, list[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]]]] = []
    flops = 0

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal flops
            if operation in PRODUCTS:
                left, right = (
                    (x for x in args if isinstance(x, torch.Tensor) and x.dim() > 1) if len(args) == 2 else args[-2:]
                )
                flops += 2 * left.numel() * right.shape[-1]
                calls.append((operation, [(x.shape, x.stride(), x.dtype, x.device) for x in args]))
            return operation(*args, **(kwargs or {}))

    with Record(), torch.no_grad():
        function()
    operands = [
        (operation, [torch.empty_strided(s, t, dtype=d, device=v).normal_(std=0.02) for s, t, d, v in shapes])
        for operation, shapes in calls
    ]

    def run() -> None:
        with torch.no_grad():
            for operation, tensors in operands:
                operation(*tensors)

    return run, flops


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------- results


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Versions and hardware, without anything that names this one machine."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    if arguments.device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    return {
        "transformers_delta_llava": transformers_delta_llava.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": name,
        "threads": arguments.threads,
        "options": {k: str(v) for k, v in vars(arguments).items() if k not in ("output", "threads")},
    }


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows of equal keys, floats to three figures."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            *(
                f"{v:.3g}" if isinstance(v, float) and v < 1000 else f"{v:,.0f}" if isinstance(v, float) else str(v)
                for v in row.values()
            )
        )
    Console(width=200).print(table)


def write_results(name: str, arguments: argparse.Namespace, **content: Any) -> Path:
    """`NAME.json` in the output folder: the machine, then the content; the path."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{name}.json"
    path.write_text(
        json.dumps({"benchmark": name, **machine(arguments), **content}, indent=1) + "\n", encoding="utf-8"
    )
    return path
