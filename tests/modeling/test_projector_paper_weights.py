"""Parameters of the `paper` projector: names, counts, gradients, training mode, lower precision."""

import pytest
import torch
from torch import nn

from tests.modeling.paper_flow import Flow, whole
from tests.modeling.projector_cases import clip_large_config, make_projector, projector_config
from tests.reference.goldens import difference
from transformers_delta_llava.modeling.configuration_delta_llava import DeltaLlavaConfig


def attention_names(prefix: str) -> set[str]:
    roles = ("norm", "query", "key", "value", "out_proj")
    return {f"{prefix}.{role}.{kind}" for role in roles for kind in ("weight", "bias")}


def convolution_names(prefix: str) -> set[str]:
    return {f"{prefix}.{name}" for name in ("group_conv.weight", "norm.weight", "norm.bias", "out_proj.weight")}


def feed_forward_names(prefix: str) -> set[str]:
    return {f"{prefix}.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")}


def test_state_dict() -> None:
    projections = ("query", "key", "value")
    module = make_projector(projector_config(projector_layout="paper"))
    expected = {f"{projection}.{name}" for projection in projections for name in ("weight", "delta_u", "delta_v")}
    expected |= attention_names("refine.attention") | convolution_names("refine.conv_attention")
    expected |= attention_names("block.attention") | convolution_names("block.conv_attention")
    expected |= feed_forward_names("block.mlp") | feed_forward_names("feed_forward")
    expected |= {f"{name}.{kind}" for name in ("feed_forward_norm", "out_proj") for kind in ("weight", "bias")}
    assert set(module.state_dict()) == expected
    for projection in projections:
        found = getattr(module, projection)
        assert all(type(parameter) is nn.Parameter for parameter in found.parameters())
        assert found.weight.shape == (32, 32)
        assert found.delta_u.shape == (3, 32, 2)
        assert found.delta_v.shape == (3, 2, 32)


def key_value_parameters(config: DeltaLlavaConfig) -> int:
    with torch.device("meta"):
        module = make_projector(config)
    return sum(p.numel() for projection in (module.key, module.value) for p in projection.parameters())


def test_keys_and_values_have_a_third_of_the_released_parameters_at_most() -> None:
    released = key_value_parameters(clip_large_config())
    shared = key_value_parameters(clip_large_config(projector_layout="paper"))
    width, levels, rank = 1024, 4, 16
    assert shared == 2 * (width * width + levels * 2 * width * rank)
    assert 3 * shared <= released


def test_no_parameter_depends_on_the_scale_factor() -> None:
    shapes = []
    for fields in ({}, {"scale_factor": 12}):
        with torch.device("meta"):
            module = make_projector(projector_config(projector_layout="paper", **fields))
        shapes.append({name: tuple(parameter.shape) for name, parameter in module.named_parameters()})
    assert shapes[0] == shapes[1]


# ---------------------------------------------------------------------------- gradients, training, dtypes


@pytest.mark.parametrize("scale_factor", [1, 2, 12])
def test_every_gradient_is_finite(scale_factor: int) -> None:
    """Only what a softmax ignores stays at zero: biases common to all keys, and scores of a single query."""
    flow = Flow({"projector_drop_path": 0.0}, scale_factor)
    output = flow.module.train()(flow.z, flow.levels, scale_factor)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    idle = ("key.bias",) if scale_factor < 12 else ("query.bias", "query.weight", "key.bias", "key.weight")
    largest = max(parameter.grad.abs().max() for parameter in flow.module.parameters())
    for name, parameter in flow.module.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if ".attention." in name and name.endswith(idle):
            assert parameter.grad.abs().max() <= 1e-12 * largest, name
        else:
            assert parameter.grad.abs().max() > 1e-7 * largest, name
        if name.endswith(("delta_u", "delta_v")):  # every level of every role learns
            assert (parameter.grad.abs().flatten(-2).amax(-1) > 0).all(), name


def test_gradients_are_those_of_the_equations() -> None:
    flow = Flow({"grid": 6})
    flow.p = {name: tensor.clone().requires_grad_() for name, tensor in flow.p.items()}
    direction = torch.randn(flow.output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (whole(flow) * direction).sum().backward()
    (flow.module(flow.z, flow.levels, 2) * direction).sum().backward()
    for name, parameter in flow.module.named_parameters():
        if not name.endswith("attention.key.bias"):  # zero but for rounding
            assert difference(parameter.grad, flow.p[name].grad) <= 1e-9, name


def test_training_without_stochastic_depth_is_evaluation() -> None:
    flow = Flow({"projector_drop_path": 0.0})
    assert torch.equal(flow.module.train()(flow.z, flow.levels, 2), flow.output)


def test_stochastic_depth_acts_in_training() -> None:
    flow = Flow({"projector_drop_path": 0.5})
    torch.manual_seed(0)
    assert not torch.equal(flow.module.train()(flow.z, flow.levels, 2), flow.output)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    flow = Flow({})
    output = flow.module.to(dtype)(flow.z.to(dtype), [z.to(dtype) for z in flow.levels], 2)
    assert output.dtype == dtype
    assert difference(output, flow.output) <= tolerance
