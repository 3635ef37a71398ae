"""The released computation that benchmarks compare with: it is what was released, and ours beats it."""

import pytest
import torch

from benchmarks.harness import peak_bytes
from benchmarks.projectors import ReleasedProjector
from tests.modeling.projector_cases import (
    clip_large_config,
    drawn_inputs,
    make_projector,
    oracle_output,
    projector_config,
    released_pair,
)
from tests.reference.goldens import difference


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 6])
def test_it_meets_the_oracle(scale_factor: int) -> None:
    module, weights = released_pair(projector_config(grid=6, projector_num_attention_heads=4))
    inputs = drawn_inputs(module.config)
    with torch.no_grad():
        output = ReleasedProjector(module)(inputs[0], inputs[1:], scale_factor)
    assert difference(output, oracle_output(module.config, weights, inputs, scale_factor)) <= 1e-6


def test_its_parameters_are_those_of_the_projector() -> None:
    module, _ = released_pair(projector_config(grid=6))
    released = ReleasedProjector(module)
    single, *levels = drawn_inputs(module.config)
    released(single, levels, 2).sum().backward()
    assert {id(p) for p in released.parameters()} == {id(p) for p in module.parameters()}
    assert all(p.grad is not None for p in module.parameters())


@torch.no_grad()
def test_ours_needs_at_most_six_tenths_of_its_memory(scale_factor: int = 2) -> None:
    module = make_projector(clip_large_config(hidden=64)).eval()
    levels = [torch.randn(1, 576, 1024) for _ in range(4)]
    ours, released = (
        peak_bytes(lambda p=projector: p(levels[-1], levels, scale_factor))
        for projector in (module, ReleasedProjector(module))
    )
    assert 0 < ours <= 0.6 * released
