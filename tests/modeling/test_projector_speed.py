"""Shortcuts of the `released` layout give the exact result."""

import pytest
import torch
from torch import Tensor

from tests.modeling.projector_cases import drawn_inputs, make_projector, oracle_output, projector_config, released_pair
from tests.reference.goldens import difference
from transformers_delta_llava.modeling.projector_delta_llava import DeltaLlavaProjector


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 6])
@pytest.mark.parametrize("fields", [{}, {"levels": 1}, {"use_delta_projection": False}], ids=str)
def test_inference_equals_training(fields: dict, scale_factor: int) -> None:
    """Levels one by one or joined, one key per window or the whole attention."""
    module = make_projector(projector_config(grid=6, **fields)).double().eval()
    single, *levels = drawn_inputs(module.config)
    with torch.no_grad():
        at_inference = module(single, levels, scale_factor)
    torch.testing.assert_close(at_inference, module(single, levels, scale_factor).detach(), rtol=0, atol=1e-12)


def test_at_scale_factor_1_values_alone_are_computed() -> None:
    module, weights = released_pair(projector_config(grid=6))
    inputs = drawn_inputs(module.config)
    called = []
    for name in ("block", "query", "key", "value"):
        getattr(module, name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        output = module(inputs[0], inputs[1:], 1)
    assert called == ["value"]
    assert difference(output, oracle_output(module.config, weights, inputs, 1)) <= 1e-6
    module(inputs[0], inputs[1:], 1)
    assert set(called) == {"block", "query", "key", "value"}, "DDP waits for the gradient of every parameter"


@torch.no_grad()
def test_levels_may_be_slices_of_longer_sequences() -> None:
    """As they come from a tower with a class token."""
    module, _ = released_pair(projector_config(grid=6))
    single, *levels = drawn_inputs(module.config)
    sliced = [torch.cat([level[:, :1], level], dim=1)[:, 1:] for level in levels]
    assert torch.equal(module(single, sliced, 2), module(single, levels, 2))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("scale_factor", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_cast_and_by_autocast(dtype: torch.dtype, scale_factor: int, gradients: bool) -> None:
    module, _ = released_pair(projector_config(grid=6), torch.float32)
    single, *levels = drawn_inputs(module.config, dtype=torch.float32)
    with torch.set_grad_enabled(gradients):
        expected = module(single, levels, scale_factor)
        with torch.autocast("cpu", dtype):
            by_autocast = module(single, levels, scale_factor)
        by_cast = module.to(dtype)(single.to(dtype), [level.to(dtype) for level in levels], scale_factor)
    assert by_autocast.dtype == by_cast.dtype == dtype
    assert difference(by_autocast.detach().float(), expected.detach()) <= 3e-2
    assert difference(by_cast.detach().float(), expected.detach()) <= 3e-2


def _in_place(module: DeltaLlavaProjector, other: DeltaLlavaProjector) -> None:
    module.key.delta_u.data.mul_(2)


def _loaded(module: DeltaLlavaProjector, other: DeltaLlavaProjector) -> None:
    module.load_state_dict(other.state_dict())


def _stepped(module: DeltaLlavaProjector, other: DeltaLlavaProjector) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    single, *levels = drawn_inputs(module.config)
    module(single, levels, 2).square().sum().backward()
    optimizer.step()


def _cast(module: DeltaLlavaProjector, other: DeltaLlavaProjector) -> None:
    module.float()


def _replaced(module: DeltaLlavaProjector, other: DeltaLlavaProjector) -> None:
    module.value.weight = other.value.weight


@pytest.mark.parametrize("change", [_in_place, _loaded, _stepped, _cast, _replaced])
def test_a_change_of_weights_shows_in_the_next_call(change) -> None:
    """Nothing that is computed from weights outlives them, whatever way they change."""
    module, other = (make_projector(projector_config(grid=6)).double().eval() for _ in range(2))
    inputs = drawn_inputs(module.config)

    def run(projector: DeltaLlavaProjector) -> Tensor:
        single, *levels = (x.to(projector.dtype) for x in inputs)
        with torch.no_grad():
            return projector(single, levels, 2)

    before = run(module)
    change(module, other)
    fresh = make_projector(module.config).to(module.dtype).eval()
    fresh.load_state_dict(module.state_dict())
    fresh.position.table = module.position.table
    assert torch.equal(run(module), run(fresh))
    assert not torch.equal(run(module).double(), before)
