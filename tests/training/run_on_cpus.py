"""
Usage: run_on_cpus.py STRATEGY RECIPE ...: runs recipes one after the other in two processes over gloo.

The processes are forks, so that only one imports everything, with the environment that `accelerate launch` gives. accelerate
enables FSDP on accelerators only; here it is enabled on CPUs too. Everything else (sharding, mixed precision,
gathering, saving) is accelerate's and DeepSpeed's own code, as on GPUs.
"""

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from transformers_delta_llava.training import load_recipe, train


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
STRATEGIES = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    },
    **{
        name: {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(CONFIGS / f"{name}.json"),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        }
        for name in ("zero2", "zero3")
    },
}


def fork(count: int) -> None:
    """Return in `count` child processes; the parent waits for them, and exits as they did."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(count):
        if not (child := os.fork()):
            os.environ.update({**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)})
            return
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))


def enable_fsdp() -> None:
    """Make accelerate use FSDP for MULTI_CPU where the environment asks for FSDP."""
    original = AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            for state in (PartialState._shared_state, AcceleratorState._shared_state):
                state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


if __name__ == "__main__":
    strategy, *recipes = sys.argv[1:]
    # transformers 5.10 restores optimizers of several processes to "cpu:0", which torch only knows as "cpu".
    torch.serialization.register_package(
        1, lambda storage: None, lambda storage, place: storage if place == "cpu:0" else None
    )
    gc.freeze()  # every run collects garbage, which takes a second where all of transformers is imported
    fork(2)
    os.environ.update(STRATEGIES[strategy])
    if strategy == "fsdp2":
        enable_fsdp()
    for recipe in recipes:
        train(load_recipe(recipe))
        AcceleratorState._reset_state()
        GradientState._reset_state()
        if strategy == "fsdp2":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
