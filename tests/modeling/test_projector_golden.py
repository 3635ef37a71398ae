"""The `released` layout against the authors' own numbers."""

import pytest
import torch
from torch import Tensor

from tests.modeling.projector_cases import golden_projector
from tests.reference import goldens
from tests.reference.goldens import BFLOAT16_TOLERANCE, MANIFEST, TOLERANCE, difference
from transformers_delta_llava.modeling.projector_delta_llava import DeltaLlavaProjector


@pytest.fixture(scope="module")
def released() -> DeltaLlavaProjector:
    """The projector of the goldens; tests change its attention implementation only."""
    return golden_projector()


def golden_inputs(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    x = {name: tensor.to(dtype) for name, tensor in goldens.inputs(case).items()}
    return x["x_single"], list(x["x_multi"].split(x["x_single"].shape[-1], dim=-1))


def scale_factor_of(case: str) -> int:
    return MANIFEST["cases"][case]["scale_factor"]


def recorded_run(module: DeltaLlavaProjector, case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The output of a case and, through forward hooks, every intermediate that the goldens name."""
    block, seen = module.block, {}

    def keep_input(name: str):
        return lambda _, arguments, __: seen.update({name: arguments[0]})

    def keep_output(name: str):
        return lambda _, __, output: seen.update({name: output})

    hooks = [
        block.stem.register_forward_hook(keep_input("query_interpolated")),
        block.stem.register_forward_hook(keep_output("ntb_stem")),
        block.attention.register_forward_hook(keep_output("attention branch")),
        block.mlp.register_forward_hook(keep_input("ntb_concat")),
        block.register_forward_hook(keep_output("query_after_ntb")),
        module.query.register_forward_hook(keep_input("query_plus_pos")),
        module.query.register_forward_hook(keep_output("q_projected")),
        module.key.register_forward_hook(keep_output("k_projected")),
        module.value.register_forward_hook(keep_output("v_projected")),
        module.window_attention.register_forward_hook(keep_output("attention_output")),
        module.position.register_forward_hook(keep_output("pos_embed")),
    ]
    try:
        with torch.no_grad():
            single, levels = golden_inputs(case, dtype)
            seen["output"] = module(single, levels, scale_factor_of(case))
    finally:
        for hook in hooks:
            hook.remove()
    seen["ntb_after_attention"] = seen["ntb_stem"] + seen.pop("attention branch")
    return seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_output_and_every_intermediate_meet_the_golden(released: DeltaLlavaProjector, attention: str) -> None:
    released.config.vision_config._attn_implementation = attention
    seen, golden = recorded_run(released, "s2"), goldens.expected("s2")
    assert set(seen) == set(MANIFEST["cases"]["s2"]["tensors"])
    for name, tensor in seen.items():
        assert difference(goldens.stored_tokens(name, tensor), golden[name]) <= TOLERANCE, name


@pytest.mark.parametrize("case", ["s2_small", "s24"])
def test_output_meets_the_golden(released: DeltaLlavaProjector, case: str) -> None:
    output = recorded_run(released, case)["output"]
    assert difference(output, goldens.expected(case)["output"]) <= TOLERANCE


@pytest.fixture(scope="module")
def rounded() -> DeltaLlavaProjector:
    return golden_projector().to(torch.bfloat16)


@pytest.mark.parametrize("case", goldens.CASES)
def test_bfloat16_meets_the_golden(rounded: DeltaLlavaProjector, case: str) -> None:
    single, levels = golden_inputs(case, torch.bfloat16)
    with torch.no_grad():
        output = rounded(single[:1], [level[:1] for level in levels], scale_factor_of(case))
    assert output.dtype == torch.bfloat16
    assert difference(output, goldens.expected(case)["output"][:1]) <= BFLOAT16_TOLERANCE


def test_gradients_at_the_published_size_are_finite(released: DeltaLlavaProjector) -> None:
    single, levels = golden_inputs("s2")
    released(single[:1], [level[:1] for level in levels], 2).square().sum().backward()
    try:
        for name, parameter in released.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    finally:
        released.zero_grad(set_to_none=True)
