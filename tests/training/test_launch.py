"""Training in two processes, under `torchrun` or sharded as under `accelerate launch`, ends where one process does."""

from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny_run import assert_same_weights, losses
from tests.training.two_processes import check_strategy, launch, train_in_one_process, write


@pytest.fixture(scope="module")
def one_process(folder: Path, tmp_path_factory: Any) -> Path:
    return train_in_one_process(folder, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_end_where_one_does(folder: Path, one_process: Path, tmp_path: Path, strategy: str) -> None:
    check_strategy(strategy, folder, one_process, tmp_path)


def test_torchrun_ends_where_one_process_does(folder: Path, one_process: Path, tmp_path: Path) -> None:
    torchrun = ["torch.distributed.run", "--nproc_per_node", 2]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    launch("-m", *torchrun, "-m", "transformers_delta_llava", "train", write(folder, tmp_path / "out"))
    assert losses(tmp_path / "out") == pytest.approx(losses(one_process / "full"), abs=1e-4)
    assert_same_weights(one_process / "full", tmp_path / "out", atol=2e-5)
