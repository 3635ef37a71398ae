"""
Runs `delta-llava` with FSDP2 over gloo on CPU.

accelerate switches FSDP on for accelerators only; here it is told to do so for CPUs too. All that follows (sharding,
mixed precision, gathering, saving) is accelerate's own code, as on GPUs.
"""

import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from transformers_delta_llava.cli.main import main


def switch_on() -> None:
    """Make accelerate take MULTI_CPU for FSDP where the launcher asks for FSDP."""
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
    switch_on()
    sys.exit(main())
