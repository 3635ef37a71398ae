"""What vLLM asks of the projector's code on CPU, checked without it; tests/integration starts the engine itself."""

import pytest
import torch
from torch import nn

from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaProjector


@pytest.mark.parametrize("layout", ["released", "paper"])
@pytest.mark.parametrize("scale_factor", [1, 2, 12])
@pytest.mark.parametrize("images", [1, 2])
def test_linear_maps_get_rows_that_lie_side_by_side(layout, scale_factor, images):
    """vLLM's linear maps on CPU refuse an input whose last axis is strided."""
    projector = DeltaLlavaProjector(tiny_config(projector_layout=layout, projector_sr_ratio=2)).eval()
    strided = []
    for name, module in projector.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: strided.append(name) if inputs[0].stride(-1) != 1 else None
            )
    levels = [torch.randn(images, 144, 64) for _ in range(3)]
    with torch.no_grad():
        projector(levels[0], levels, scale_factor)
    assert not strided
