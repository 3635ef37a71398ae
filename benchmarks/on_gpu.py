"""Starts the benchmarks on a GPU, in order of worth, each with a limit, and writes OUT/NAME.json after each.

    python benchmarks/on_gpu.py OUT [--seconds 540] [--only projector end_to_end]

Nothing is installed or downloaded: weights are random. The machine needs torch, transformers, accelerate, peft, typer and rich.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
GPU = ["--device", "cuda", "--dtype", "bfloat16"]
# Name, limit in seconds, command.
RUNS: dict[str, tuple[float, list[str]]] = {
    "projector": (90, ["projector", *GPU, "--seconds", "1"]),
    "end_to_end_7b": (150, ["end_to_end", *GPU, "--shape", "7b", "--new-tokens", "64", "--seconds", "60"]),
    "end_to_end_7b_batch32": (
        150,
        ["end_to_end", *GPU, "--shape", "7b", "--batch-size", "32", "--new-tokens", "64", "--seconds", "60"],
    ),
    "training_step": (120, ["training_step", *GPU, "--shape", "0.5b", "--seconds", "20"]),
    "scaling": (60, ["scaling", *GPU, "--seconds", "2"]),
    "deltas": (60, ["deltas", *GPU]),
}


def main() -> None:
    """Run what there is time for; the exit code is 1 where something failed."""
    parser = argparse.ArgumentParser(description="Run the benchmarks on a GPU.")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all together")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    start, states = time.monotonic(), {}
    for name in arguments.only:
        limit, (script, *options) = RUNS[name]
        left = arguments.seconds - (time.monotonic() - start)
        command = [sys.executable, "-m", f"benchmarks.{script}", *options, "--output", str(arguments.output.resolve())]
        began = time.monotonic()
        try:
            with (arguments.output / f"{name}.log").open("w") as log:
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=min(limit, max(left, 1)),
                )
            state = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            state = "stopped at its limit"
        states[name] = {"state": state, "seconds": round(time.monotonic() - began, 1)}
        print(f"{name}: {state}, {states[name]['seconds']} s", flush=True)
        (arguments.output / "runs.json").write_text(json.dumps(states, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(state["state"] != "exit code 0" for state in states.values()))


if __name__ == "__main__":
    main()
