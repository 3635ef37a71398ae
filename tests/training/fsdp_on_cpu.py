"""
Runs recipes one after the other with FSDP2 over gloo on CPU.

accelerate enables FSDP on accelerators only; here it is enabled on CPUs too. Everything else (sharding, mixed precision,
gathering, saving) is accelerate's own code, as on GPUs.
"""

import sys
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from transformers_delta_llava.training import load_recipe, train


def enable_fsdp() -> None:
    """Make accelerate use FSDP for MULTI_CPU where the launcher asks for FSDP."""
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
    enable_fsdp()
    for recipe in sys.argv[1:]:
        train(load_recipe(recipe))
        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()  # its threads may abort a process that exits with them
