"""SIGKILL at random moments of a small conversion: no half repo, and every rerun ends in the same bytes.

    python -m tests.robustness.kill_conversions [--kills 200] [--seed 0] [--json FILE]

Every other conversion replaces an earlier output. After each kill the output must be absent or whole (the earlier one or
the new one; between the two renames the earlier one lies beside it, where the next run finds it); then the conversion is
run again and its files are compared, hash by hash. Exits with code 1 where one of this fails.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from examples.make_checkpoint import write_checkpoint
from tests.checkpoints import SHALLOW
from tests.robustness.children import hashes, outcome, start
from transformers_delta_llava.conversion import convert_checkpoint


def run(kills: int, seed: int, folder: Path) -> dict:
    """Kill so many, and rerun each; returns counts, and a list of failures."""
    source, output = folder / "source", folder / "out"
    write_checkpoint(source, shards=2, form="bin", **SHALLOW)

    def convert(overwrite: bool) -> None:
        convert_checkpoint(source, output, overwrite=overwrite, max_shard_size="1MB")

    begun = time.monotonic()
    outcome(lambda: convert(False), timeout=300)
    duration = time.monotonic() - begun
    whole, before = hashes(output), hashes(source)
    earlier = shutil.copytree(output, folder / "earlier")
    (earlier / "README.md").write_text("an earlier conversion")
    former = hashes(earlier)
    rng, failures = random.Random(seed), []
    counts = {"kills": 0, "finished before the kill": 0, "absent": 0, "earlier": 0, "new": 0, "between renames": 0}
    while counts["kills"] < kills:
        number = counts["kills"] + counts["finished before the kill"]
        replacing = number % 2 == 1
        _clear(folder, output)
        if replacing:
            shutil.copytree(earlier, output)
        child, pipe = start(lambda replacing=replacing: convert(replacing))
        time.sleep(rng.uniform(0, duration * 1.1))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(pipe)
        counts["kills" if killed else "finished before the kill"] += 1
        found = hashes(output) if output.exists() else None
        previous = folder / f".{output.name}.delta-llava" / "previous"
        if found is None:
            state = "absent" if not replacing else "between renames"
            if replacing and (not previous.exists() or hashes(previous) != former):
                failures.append(f"{number}: the earlier output is lost")
        else:
            state = "new" if found == whole else "earlier" if replacing and found == former else "half"
        if state == "half":
            failures.append(f"{number}: half a repo: {sorted(found or ())}")
        else:
            counts[state] += 1
        again = outcome(lambda: convert(True), timeout=300)
        if "value" not in again or hashes(output) != whole:
            failures.append(f"{number}: the rerun differs: {again}")
        if strays := [path.name for path in folder.iterdir() if path.name.startswith(".out")]:
            failures.append(f"{number}: left behind: {strays}")
    if hashes(source) != before:
        failures.append("the source was changed")
    return {"seed": seed, "seconds per conversion": round(duration, 3), **counts, "failures": failures}


def _clear(folder: Path, output: Path) -> None:
    for path in (output, *folder.glob(f".{output.name}.*")):
        shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    """Run, print, exit."""
    parser = argparse.ArgumentParser(description="Kill conversions at random moments.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(arguments.kills, arguments.seed, Path(folder))
    for name, value in result.items():
        print(f"{name:>26}: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
