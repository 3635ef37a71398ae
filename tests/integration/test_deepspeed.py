"""Training in two processes under DeepSpeed ends where one process does: whole weights, LoRA, and both resumed."""

from pathlib import Path

import pytest

from tests.integration.engines import Engine, needs
from tests.training.tiny_run import assert_same_weights, write_data, write_model
from tests.training.two_processes import ROOT, check_strategy, launch, train_in_one_process, write


pytestmark = needs("deepspeed")
# DeepSpeed compiles its communication for CPUs at its first start; two processes that do so wait for each other.
COMPILE = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    write_model(folder / "model", projector_drop_path=0.0)
    write_data(folder / "data", 16)
    return folder


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory) -> Path:
    return train_in_one_process(folder, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    """For `launch`: the environment's Python, and where its compiled parts are kept."""
    engine = Engine("deepspeed", tmp_path_factory.mktemp("scratch"))
    path = f"{engine.python.parent}:/usr/local/bin:/usr/bin:/bin"  # of ninja
    kept = {"PATH": path, "TORCH_EXTENSIONS_DIR": str(engine.python.parents[1] / "extensions")}
    launch("-c", COMPILE, python=engine.python, **kept)
    return {"python": engine.python, **kept}


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_two_processes_end_where_one_does(folder, one_process, tmp_path, options, strategy) -> None:
    check_strategy(strategy, folder, one_process, tmp_path, **options)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_shipped_config_runs(folder, one_process, tmp_path, options, stage) -> None:
    config = ROOT / "examples" / "accelerate" / f"deepspeed-zero{stage}.yaml"
    command = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    recipe = write(folder, tmp_path / "out")
    launch(*command, "-m", "transformers_delta_llava", "train", recipe, **options)
    assert_same_weights(one_process / "full", tmp_path / "out", atol=2e-5)
