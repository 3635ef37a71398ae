"""The `paper` layout against equations (3) to (11), each taken on the tensors that really flow."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tests.modeling import paper_equations as paper
from tests.modeling.projector_cases import clip_large_config, drawn_inputs, projector, projector_config
from tests.reference import oracle
from tests.reference.goldens import difference
from transformers_delta_llava.modeling.configuration_delta_llava import DeltaLlavaConfig
from transformers_delta_llava.modeling.projector_delta_llava import DeltaLlavaProjector

TOLERANCE = 1e-10  # float64, and no float32 step on the way (the table is compared as it is)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one base for all roles": {"delta_sharing": "all"},
    "windows of two": {"projector_window_size": 2},
    "windows of three, one base": {"projector_window_size": 3, "delta_sharing": "all"},
    "one level, rank one": {"levels": 1, "delta_rank": 1},
    "five levels, four heads": {"levels": 5, "projector_num_attention_heads": 4},
    "reduced keys": {"projector_sr_ratio": 2},
    "reduced keys that do not fit": {"projector_sr_ratio": 4},
    "wide": {"width": 96, "projector_head_dim": 16, "projector_mlp_ratio": 3, "hidden": 40},
    "one head per block": {"projector_head_dim": 32},
}


class Flow:
    """One forward pass and what went in and out of its submodules, by the symbols of the paper."""

    def __init__(self, fields: dict[str, Any], scale_factor: int = 2, attention: str = "sdpa"):
        self.config = projector_config(projector_layout="paper", attention=attention, **({"grid": 12} | fields))
        self.module = projector(self.config)
        self.p = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        self.z, *self.levels = drawn_inputs(self.config)
        self.side = self.config.grid_size // scale_factor
        seen: dict[str, Any] = {}

        def keep(module: nn.Module, source: str | None, result: str | None) -> RemovableHandle:
            """Records what first goes into and comes out of a module."""

            def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                for name, value in ((source, inputs if len(inputs) == 3 else inputs[0]), (result, output)):
                    if name:
                        seen.setdefault(name, value)

            return module.register_forward_hook(hook)

        hooks = [
            keep(self.module.refine, "interpolated", "refined"),
            keep(self.module.qkv_proj if self.shares_all else self.module.q_proj, "q_hat", "q0"),
            keep(self.module.block, "block input", "q"),
            keep(self.module.window_attention, "memory", "y"),
            keep(self.module.out_proj, "t", None),
        ]
        with torch.no_grad():
            self.output = self.module(self.z, self.levels, scale_factor)
        for hook in hooks:
            hook.remove()
        self.seen = seen

    @property
    def shares_all(self) -> bool:
        return self.config.delta_sharing == "all"

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.config.projector_head_dim, self.config.projector_sr_ratio

    def projected(self, role: str, x: Tensor, *level: int) -> Tensor:
        if self.shares_all:
            return paper.project(paper.below(self.p, "qkv_proj"), x, "qkv".index(role), *level)
        return paper.project(paper.below(self.p, f"{role}_proj"), x, *level)


@pytest.fixture(scope="module", params=CASES)
def flow(request: pytest.FixtureRequest) -> Flow:
    return Flow(CASES[request.param])


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert difference(actual, expected) <= TOLERANCE


# ---------------------------------------------------------------------------- equation by equation


def test_equation_3_refined_queries_with_positions(flow: Flow) -> None:
    interpolated = paper.interpolated(flow.z, flow.side)
    assert_same(flow.seen["interpolated"], interpolated)
    refined = paper.refine(paper.below(flow.p, "refine"), interpolated, *flow.block_sizes)
    assert_same(flow.seen["refined"], refined)
    table = oracle.position_table(flow.config.grid_size, flow.z.shape[-1])
    assert_same(flow.seen["q_hat"], refined + oracle.resize_positions(table, flow.side).double())


def test_equation_4_query_projection_sums_the_updates_of_the_levels(flow: Flow) -> None:
    assert_same(flow.seen["q0"], flow.projected("q", flow.seen["q_hat"]))
    assert torch.equal(flow.seen["block input"], flow.seen["q0"])


def test_equation_5_number_of_queries(flow: Flow) -> None:
    image, patch = (flow.config.vision_config.image_size, flow.config.vision_config.patch_size)
    assert flow.seen["q"].shape[1] == image * image // (patch**2 * 2**2) == flow.config.num_visual_tokens(2)


def test_equation_6_cascade(flow: Flow) -> None:
    assert_same(flow.seen["q"], paper.cascade(paper.below(flow.p, "block"), flow.seen["q0"], *flow.block_sizes))


def test_equations_7_and_8_keys_and_values_of_every_level(flow: Flow) -> None:
    query, keys, values = flow.seen["memory"]
    assert torch.equal(query, flow.seen["q"])
    assert len(keys) == len(values) == len(flow.levels)
    for level, z in enumerate(flow.levels):
        assert_same(keys[level], flow.projected("k", z, level))
        assert_same(values[level], flow.projected("v", z, level))


def test_equations_9_and_10_window_attention(flow: Flow) -> None:
    heads = flow.config.projector_num_attention_heads or 1
    window = flow.config.projector_window_size
    assert_same(flow.seen["y"], paper.window_attention(*flow.seen["memory"], heads, window))


def test_equation_11_feed_forward_and_the_map_to_the_language_model(flow: Flow) -> None:
    t = paper.feed_forward(flow.p, flow.seen["y"])
    assert_same(flow.seen["t"], t)
    assert flow.module.feed_forward.fc1.out_features == flow.config.text_config.hidden_size
    assert_same(flow.output, paper.linear(flow.p, "out_proj", t))


# ---------------------------------------------------------------------------- the whole chain


def whole(flow: Flow, use_emhsa: bool = True, use_block: bool = True) -> Tensor:
    """Equations (3) to (11) one after another, from the inputs alone."""
    table = oracle.position_table(flow.config.grid_size, flow.z.shape[-1])
    q = paper.refine(
        paper.below(flow.p, "refine"), paper.interpolated(flow.z, flow.side), *flow.block_sizes, use_emhsa=use_emhsa
    )
    q = flow.projected("q", q + oracle.resize_positions(table, flow.side).double())
    if use_block:
        q = paper.cascade(paper.below(flow.p, "block"), q, *flow.block_sizes, use_emhsa=use_emhsa)
    keys, values = ([flow.projected(role, z, i) for i, z in enumerate(flow.levels)] for role in "kv")
    heads = flow.config.projector_num_attention_heads or 1
    y = paper.window_attention(q, keys, values, heads, flow.config.projector_window_size)
    return paper.linear(flow.p, "out_proj", paper.feed_forward(flow.p, y))


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("fields", [{}, {"delta_sharing": "all", "projector_sr_ratio": 2}], ids=["levels", "all"])
def test_every_scale_factor(scale_factor: int, fields: dict[str, Any]) -> None:
    flow = Flow(fields, scale_factor)
    assert flow.output.shape == (2, (12 // scale_factor) ** 2, 24)
    assert_same(flow.output, whole(flow))


@pytest.mark.parametrize("window, scale_factor", [(2, 1), (2, 3), (2, 6), (3, 2), (3, 4), (4, 3), (6, 1), (12, 1)])
def test_every_window_tiles_its_grid(window: int, scale_factor: int) -> None:
    flow = Flow({"projector_window_size": window, "levels": 2}, scale_factor)
    assert_same(flow.output, whole(flow))


@pytest.mark.parametrize("grid, scale_factor", [(24, 24), (27, 9), (16, 4), (7, 7), (1, 1)])
def test_other_grids(grid: int, scale_factor: int) -> None:
    flow = Flow({"grid": grid, "levels": 2, "projector_sr_ratio": 3}, scale_factor)
    assert_same(flow.output, whole(flow))


def test_eager_attention_gives_the_same() -> None:
    flow = Flow({"projector_sr_ratio": 2}, attention="eager")
    assert difference(flow.output, whole(flow)) <= 1e-6  # its softmax is in float32


def test_a_window_sees_the_patches_of_its_cell_at_every_level() -> None:
    """s * s * L memory tokens for w = 1: a change of one patch reaches one token, and from every level."""
    flow = Flow({"grid": 6, "levels": 4}, scale_factor=3)
    for level in range(4):
        changed = [z.clone() for z in flow.levels]
        changed[level][:, 4 * 6 + 1] += 1  # row 4, column 1: cell (1, 0) of the 2 x 2 query grid
        with torch.no_grad():
            moved = (flow.module(flow.z, changed, 3) - flow.output).abs().amax(dim=(0, 2)) > 1e-9
        assert moved.tolist() == [False, False, True, False]


def test_run_time_scale_factor_equals_the_configured_one() -> None:
    flow = Flow({}, scale_factor=3)
    configured = DeltaLlavaProjector(projector_config(grid=12, projector_layout="paper", scale_factor=3)).double()
    configured.load_state_dict(flow.module.state_dict())
    assert torch.equal(configured.eval()(flow.z, flow.levels), flow.output)


# ---------------------------------------------------------------------------- ablations of Table 3


def ablated(flow: Flow, absent: tuple[str, ...], **switch: bool) -> Tensor:
    """The output of a projector without the switched-off part, loaded strictly with the rest of the weights."""
    config = projector_config(grid=12, projector_layout="paper", **switch)
    module = DeltaLlavaProjector(config).double().eval()
    state = flow.module.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(absent)}
    assert len(kept) < len(state)
    module.load_state_dict(kept)
    return module(flow.z, flow.levels, 2)


def test_without_emhsa_only_mhca_refines_and_mixes() -> None:
    flow = Flow({})
    output = ablated(flow, ("refine.attention.", "block.attention."), use_emhsa=False)
    assert_same(output, whole(flow, use_emhsa=False))


def test_without_the_transformer_block_projected_queries_attend_at_once() -> None:
    flow = Flow({})
    assert_same(ablated(flow, ("block.",), use_transformer_block=False), whole(flow, use_block=False))


def test_without_delta_projection_every_level_has_the_base_alone() -> None:
    flow = Flow({})
    output = ablated(flow, tuple(f"{r}_proj.delta" for r in "qkv"), use_delta_projection=False)
    for role in "qkv":
        flow.p[f"{role}_proj.delta_u"] = torch.zeros_like(flow.p[f"{role}_proj.delta_u"])
    assert_same(output, whole(flow))


# ---------------------------------------------------------------------------- parameters


def attention_names(prefix: str) -> set[str]:
    roles = ("norm", "q_proj", "k_proj", "v_proj", "out_proj")
    return {f"{prefix}.{role}.{kind}" for role in roles for kind in ("weight", "bias")}


def convolution_names(prefix: str) -> set[str]:
    return {f"{prefix}.{name}" for name in ("group_conv.weight", "norm.weight", "norm.bias", "out_proj.weight")}


def feed_forward_names(prefix: str) -> set[str]:
    return {f"{prefix}.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")}


@pytest.mark.parametrize("sharing, projections", [("levels", ("q_proj", "k_proj", "v_proj")), ("all", ("qkv_proj",))])
def test_state_dict(sharing: str, projections: tuple[str, ...]) -> None:
    module = DeltaLlavaProjector(projector_config(projector_layout="paper", delta_sharing=sharing))
    expected = {f"{projection}.{name}" for projection in projections for name in ("weight", "delta_u", "delta_v")}
    expected |= attention_names("refine.attention") | convolution_names("refine.conv_attention")
    expected |= attention_names("block.attention") | convolution_names("block.conv_attention")
    expected |= feed_forward_names("block.mlp") | feed_forward_names("feed_forward")
    expected |= {f"{name}.{kind}" for name in ("feed_forward_norm", "out_proj") for kind in ("weight", "bias")}
    assert set(module.state_dict()) == expected
    updates = (3, 3) if sharing == "all" else (3,)  # roles, levels
    for projection in projections:
        found = getattr(module, projection)
        assert all(type(parameter) is nn.Parameter for parameter in found.parameters())
        assert found.weight.shape == (32, 32)
        assert found.delta_u.shape == (*updates, 32, 2)
        assert found.delta_v.shape == (*updates, 2, 32)


@pytest.mark.parametrize("sharing", ["levels", "all"])
def test_state_dict_survives_safetensors(sharing: str, tmp_path) -> None:
    flow = Flow({"delta_sharing": sharing})
    save_file(flow.module.state_dict(), tmp_path / "projector.safetensors")
    other = DeltaLlavaProjector(flow.config).double().eval()
    other.load_state_dict(load_file(tmp_path / "projector.safetensors"))
    assert torch.equal(other(flow.z, flow.levels, 2), flow.output)


def key_value_parameters(config: DeltaLlavaConfig) -> int:
    with torch.device("meta"):
        module = DeltaLlavaProjector(config)
    return sum(p.numel() for projection in (module.k_proj, module.v_proj) for p in projection.parameters())


def test_keys_and_values_have_a_third_of_the_released_parameters_at_most() -> None:
    released = key_value_parameters(clip_large_config())
    shared = key_value_parameters(clip_large_config(projector_layout="paper"))
    width, levels, rank = 1024, 4, 16
    assert shared == 2 * (width * width + levels * 2 * width * rank)
    assert 3 * shared <= released


def test_no_parameter_depends_on_scale_factor_or_window() -> None:
    shapes = []
    for fields in ({}, {"scale_factor": 12}, {"scale_factor": 3, "projector_window_size": 4}):
        with torch.device("meta"):
            module = DeltaLlavaProjector(projector_config(projector_layout="paper", **fields))
        shapes.append({name: tuple(parameter.shape) for name, parameter in module.named_parameters()})
    assert shapes[0] == shapes[1] == shapes[2]


# ---------------------------------------------------------------------------- gradients, training, dtypes


@pytest.mark.parametrize("sharing", ["levels", "all"])
@pytest.mark.parametrize("scale_factor", [1, 2, 12])
def test_every_gradient_is_finite(scale_factor: int, sharing: str) -> None:
    """Only what a softmax ignores stays at zero: biases common to all keys, and scores of a query that is alone."""
    flow = Flow({"delta_sharing": sharing, "projector_drop_path": 0.0}, scale_factor)
    output = flow.module.train()(flow.z, flow.levels, scale_factor)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    idle = ("k_proj.bias",) if scale_factor < 12 else ("q_proj.bias", "q_proj.weight", "k_proj.bias", "k_proj.weight")
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
    flow = Flow({"grid": 6, "projector_window_size": 3})
    flow.p = {name: tensor.clone().requires_grad_() for name, tensor in flow.p.items()}
    direction = torch.randn(flow.output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (whole(flow) * direction).sum().backward()
    (flow.module(flow.z, flow.levels, 2) * direction).sum().backward()
    for name, parameter in flow.module.named_parameters():
        if not name.endswith("attention.k_proj.bias"):  # zero but for rounding
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


def test_budgets_count_whole_windows() -> None:
    config = projector_config(grid=12, projector_layout="paper", projector_window_size=3)
    assert config.visual_token_budgets == (144, 36, 9)
    assert all(math.isqrt(budget) % 3 == 0 for budget in config.visual_token_budgets)
    flow = Flow({"projector_window_size": 3})
    with pytest.raises(ValueError, match="scale_factor=3"):
        flow.module(flow.z, flow.levels, 3)
