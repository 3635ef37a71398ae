"""Push a repo through injected faults, and compare what the server then holds with the folder, hash by hash.

    python benchmarks/push_through_faults.py [--faults 20] [--seed 0] [--runs 1]

The Hub is the one of the tests, on this machine; the client is huggingface_hub's own, over HTTP. A fault is an answer of
500 or 429, silence, a connection cut in the middle of a request, or one cut after the request was carried out. Every
run has the next seed. Exits with 1 if a run injected fewer faults than asked for, ended without every file, made more
than one commit, or carried a file out twice.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


# Before huggingface_hub is imported: the tests' Hub has no Xet storage, and pytest's offline mode must not reach here.
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import huggingface_hub  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from examples.make_checkpoint import write_checkpoint  # noqa: E402
from tests.hub_faults import FAULTS, Faults  # noqa: E402
from tests.hub_server import TOKEN, HubServer  # noqa: E402
from transformers_delta_llava.conversion import convert_checkpoint  # noqa: E402
from transformers_delta_llava.hub import push_folder  # noqa: E402


REPO = "org/delta-llava-tiny"


def push_once(folder: Path, faults: int, seed: int) -> dict:
    """One push to a server of its own; what happened, and `problems`, which should be empty."""
    with HubServer(Faults(faults, seed), stall=3.0) as server:
        start = time.perf_counter()
        api = huggingface_hub.HfApi(endpoint=server.url, token=TOKEN)
        report = push_folder(folder, REPO, api=api, first_wait=0.2, silence=1.0)
        seconds = time.perf_counter() - start
        drawn, requests = server.faults.done, server.requests
        there = {name: _sha256(content) for name, content in server.files(REPO).items() if name != ".gitattributes"}
    here = {path.name: _sha256(path.read_bytes()) for path in folder.iterdir()}
    commits = sum(count for request, count in requests.items() if "/commit/" in request)
    # A "lost" upload was carried out and not answered, so the client has to ask again: that is no waste.
    lost = Counter(request for request, kind in drawn if kind == "lost")
    twice = [request for request, count in requests.items() if request.startswith("PUT") and count > 1 + lost[request]]
    problems = [f"{len(drawn)} faults instead of {faults}"] if len(drawn) != faults else []
    problems += [f"{name} differs" for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
    problems += [f"{commits} commits"] if commits != 1 else []
    problems += [f"uploaded more than once: {request}" for request in twice]
    return {
        "seed": seed,
        "faults": {kind: Counter(kind for _, kind in drawn)[kind] for kind in FAULTS},
        "files": len(here),
        "equal": sum(here[name] == there.get(name) for name in here),
        "retries": report.retries,
        "requests": sum(requests.values()),
        "seconds": round(seconds, 1),
        "problems": problems,
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """Run, print a table, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(Path(scratch) / "llava-tiny")
        folder = Path(scratch) / "delta-llava-tiny"
        convert_checkpoint(Path(scratch) / "llava-tiny", folder, max_shard_size="600KB")
        runs = [push_once(folder, options.faults, options.seed + i) for i in range(options.runs)]
    table = Table("seed", *FAULTS, "files", "equal", "retries", "requests", "seconds", title="Pushes through faults")
    for run in runs:
        cells = [
            run["seed"],
            *run["faults"].values(),
            *(run[k] for k in ("files", "equal", "retries", "requests", "seconds")),
        ]
        table.add_row(*map(str, cells))
    Console().print(table)
    if options.json:
        result = {"huggingface_hub": huggingface_hub.__version__, "faults_per_run": options.faults, "runs": runs}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    problems = [f"seed {run['seed']}: {problem}" for run in runs for problem in run["problems"]]
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
