"""SIGKILL at random moments of a small conversion: no half repo, and every rerun ends in the same bytes.

Every other conversion replaces an earlier output. After each kill the output must be absent or whole (the earlier one or
the new one; between the two renames the earlier one lies beside it, where the next run finds it).

Four kills here; `KILLS=200 FUZZ_SEED=1 python -m pytest tests/robustness/test_killed_conversions.py` for more.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.robustness.children import hashes, outcome, start
from transformers_delta_llava.conversion import convert_checkpoint


KILLS = int(os.environ.get("KILLS", "4"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
EARLIER = "an earlier conversion"


def kill_and_rerun(convert: Callable[..., object], source: Path, folder: Path, kills: int) -> list[str]:
    """Kill so many conversions and run each again; returns what is wrong."""
    output, failures, rng = folder / "out", [], random.Random(SEED)

    def run(convert: Callable[..., object]) -> None:
        convert(source, output, overwrite=True, max_shard_size="1MB")

    begun = time.monotonic()
    outcome(lambda: run(convert_checkpoint), timeout=300)
    duration = time.monotonic() - begun
    new, before = hashes(output), hashes(source)
    shutil.copytree(output, folder / "earlier")
    (folder / "earlier" / "README.md").write_text(EARLIER)
    earlier = hashes(folder / "earlier")
    previous = folder / ".out.delta-llava" / "previous"
    for number in range(kills):
        for path in (output, *folder.glob(".out.*")):
            shutil.rmtree(path, ignore_errors=True)
        if number % 2:
            shutil.copytree(folder / "earlier", output)
        child, pipe = start(lambda: run(convert))
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pipe)
        if output.exists() and hashes(output) not in ((new, earlier) if number % 2 else (new,)):
            failures.append(f"{number}: half a repo: {sorted(hashes(output))}")
        if not output.exists() and number % 2 and not (previous.exists() and hashes(previous) == earlier):
            failures.append(f"{number}: the earlier output is lost")
        again = outcome(lambda: run(convert_checkpoint), timeout=300)
        if "value" not in again or hashes(output) != new:
            failures.append(f"{number}: the rerun differs: {again}")
        if rest := [path.name for path in folder.glob(".out*")]:
            failures.append(f"{number}: left behind: {rest}")
    if hashes(source) != before:
        failures.append("the source was changed")
    return failures


@pytest.mark.usefixtures("repo")  # after a conversion in this process, children import nothing
def test_no_kill_leaves_half_a_repo(pristine: Path, tmp_path: Path) -> None:
    assert kill_and_rerun(convert_checkpoint, pristine / "llava-tiny", tmp_path, KILLS) == []


def test_half_a_repo_is_noticed(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_half(source: Path, output: Path, **options: object) -> None:
        card = output / "README.md"
        if card.exists() and card.read_text() == EARLIER:
            card.unlink()
        time.sleep(60)  # the kill comes sooner

    monkeypatch.setattr(random.Random, "uniform", lambda self, low, high: 0.5)
    failures = kill_and_rerun(leave_half, pristine / "llava-tiny", tmp_path, 2)
    assert any("half a repo" in failure for failure in failures)
