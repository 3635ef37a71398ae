"""SIGKILL at random moments of a small conversion: no half repo, and the next run ends in the same bytes."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.checkpoints import hashes
from tests.robustness.children import start
from transformers_delta_llava.conversion import convert_checkpoint


@pytest.mark.usefixtures("repo")  # after a conversion in this process, children import nothing
def test_no_kill_leaves_half_a_repo(pristine: Path, tmp_path: Path) -> None:
    source, output = pristine / "llava-tiny", tmp_path / "out"
    convert = partial(convert_checkpoint, source, output, max_shard_size="1MB")
    begun = time.monotonic()
    convert()
    duration = time.monotonic() - begun
    whole, before, rng = hashes(output), hashes(source), random.Random(0)
    for _ in range(4):
        output.rename(tmp_path / f"earlier-{time.monotonic_ns()}")
        child, pipe = start(convert)
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pipe)
        assert not output.exists() or hashes(output) == whole
        convert(overwrite=True)
        assert hashes(output) == whole
    assert hashes(source) == before
