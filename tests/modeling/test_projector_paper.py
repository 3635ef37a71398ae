"""The `paper` layout against equations (3) to (11), each taken on the tensors that really flow."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.modeling import paper_equations as paper
from tests.modeling.paper_flow import Flow, assert_same, whole
from tests.modeling.projector_cases import make_projector, projector_config
from tests.reference import oracle
from tests.reference.goldens import difference


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one level, rank one": {"levels": 1, "delta_rank": 1},
    "five levels, four heads": {"levels": 5, "projector_num_attention_heads": 4},
    "wide": {"width": 96, "projector_head_dim": 16, "projector_mlp_ratio": 3, "hidden": 40},
    "one head per block": {"projector_head_dim": 32},
}


@pytest.fixture(scope="module", params=CASES)
def flow(request: pytest.FixtureRequest) -> Flow:
    return Flow(CASES[request.param])


# ---------------------------------------------------------------------------- equation by equation


def test_equation_3_refined_queries_with_positions(flow: Flow) -> None:
    interpolated = paper.interpolated(flow.z, flow.side)
    assert_same(flow.seen["interpolated"], interpolated)
    refined = paper.refine(paper.below(flow.p, "refine"), interpolated, flow.head_dim)
    assert_same(flow.seen["refined"], refined)
    positions = flow.module.position(flow.side, torch.float64)
    assert_same(flow.seen["q_hat"], refined + positions)
    table = oracle.position_table(flow.config.grid_size, flow.z.shape[-1])
    assert difference(positions, oracle.resize_positions(table, flow.side).double()) <= 1e-6


def test_equation_4_query_projection_sums_the_updates_of_the_levels(flow: Flow) -> None:
    assert_same(flow.seen["q0"], flow.projected("q", flow.seen["q_hat"]))
    assert torch.equal(flow.seen["block input"], flow.seen["q0"])


def test_equation_5_number_of_queries(flow: Flow) -> None:
    image, patch = (flow.config.vision_config.image_size, flow.config.vision_config.patch_size)
    assert flow.seen["q"].shape[1] == image * image // (patch**2 * 2**2) == flow.config.num_visual_tokens_for(2)


def test_equation_6_cascade(flow: Flow) -> None:
    assert_same(flow.seen["q"], paper.cascade(paper.below(flow.p, "block"), flow.seen["q0"], flow.head_dim))


def test_equations_7_and_8_keys_and_values_of_every_level(flow: Flow) -> None:
    query, keys, values = flow.seen["memory"]
    assert torch.equal(query, flow.seen["q"])
    assert len(keys) == len(values) == len(flow.levels)
    for level, z in enumerate(flow.levels):
        assert_same(keys[level], flow.projected("k", z, level))
        assert_same(values[level], flow.projected("v", z, level))


def test_equations_9_and_10_window_attention(flow: Flow) -> None:
    heads = flow.config.projector_num_attention_heads or 1
    assert_same(flow.seen["y"], paper.window_attention(*flow.seen["memory"], heads))


def test_equation_11_feed_forward_and_the_map_to_the_language_model(flow: Flow) -> None:
    t = paper.feed_forward(flow.p, flow.seen["y"])
    assert_same(flow.seen["t"], t)
    assert flow.module.feed_forward.fc1.out_features == flow.config.text_config.hidden_size
    assert_same(flow.output, paper.linear(flow.p, "out_proj", t))


# ---------------------------------------------------------------------------- the whole chain


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 4, 6, 12])
def test_every_scale_factor(scale_factor: int) -> None:
    flow = Flow({}, scale_factor)
    assert flow.output.shape == (2, (12 // scale_factor) ** 2, 24)
    assert_same(flow.output, whole(flow))


@pytest.mark.parametrize("grid, scale_factor", [(24, 24), (27, 9), (16, 4), (7, 7), (1, 1)])
def test_other_grids(grid: int, scale_factor: int) -> None:
    flow = Flow({"grid": grid, "levels": 2}, scale_factor)
    assert_same(flow.output, whole(flow))


def test_eager_attention_gives_the_same() -> None:
    flow = Flow({}, attention="eager")
    assert difference(flow.output, whole(flow)) <= 1e-6  # its softmax is in float32


def test_a_window_sees_the_patches_of_its_cell_at_every_level() -> None:
    """s * s * L memory tokens: a change of one patch reaches one token, and from every level."""
    flow = Flow({"grid": 6, "levels": 4}, scale_factor=3)
    for level in range(4):
        changed = [z.clone() for z in flow.levels]
        changed[level][:, 4 * 6 + 1] += 1  # row 4, column 1: cell (1, 0) of the 2 x 2 query grid
        with torch.no_grad():
            moved = (flow.module(flow.z, changed, 3) - flow.output).abs().amax(dim=(0, 2)) > 1e-9
        assert moved.tolist() == [False, False, True, False]


def test_run_time_scale_factor_equals_the_configured_one() -> None:
    flow = Flow({}, scale_factor=3)
    configured = make_projector(projector_config(grid=12, projector_layout="paper", scale_factor=3)).double()
    configured.load_state_dict(flow.module.state_dict())
    assert torch.equal(configured.eval()(flow.z, flow.levels), flow.output)


# ---------------------------------------------------------------------------- ablations of Table 3


def ablated(flow: Flow, absent: tuple[str, ...], **switch: bool) -> Tensor:
    """The output of a projector without the switched-off part, loaded strictly with the rest of the weights."""
    config = projector_config(grid=12, projector_layout="paper", **switch)
    module = make_projector(config).double().eval()
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
    output = ablated(flow, tuple(f"{r}.delta" for r in ("query", "key", "value")), use_delta_projection=False)
    for role in ("query", "key", "value"):
        flow.p[f"{role}.delta_u"] = torch.zeros_like(flow.p[f"{role}.delta_u"])
    assert_same(output, whole(flow))
