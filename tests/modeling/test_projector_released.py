"""The `released` layout against the oracle: any size, any scale factor, gradients, ablations."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tests.modeling.projector_cases import (
    FLOAT64_TOLERANCE,
    assert_meets_oracle,
    drawn_inputs,
    make_projector,
    oracle_output,
    projector_config,
    released_pair,
)
from tests.reference import names, oracle
from tests.reference.goldens import difference
from transformers_delta_llava.modeling.projector_delta_llava import DeltaLlavaProjector, eager_attention_forward


# Gradients that are zero but for rounding: a softmax ignores what is added to all scores.
KEY_BIASES = ("block.attention.key.bias", "key.norm.bias")


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_scale_factor_meets_the_oracle(scale_factor: int, attention: str) -> None:
    assert_meets_oracle(projector_config(attention=attention), scale_factor)


@pytest.mark.parametrize(
    "sizes, scale_factor",
    [
        ({"grid": 16}, 2),
        ({"grid": 16}, 16),
        ({"grid": 27}, 3),
        ({"grid": 27}, 9),
        ({"grid": 7}, 7),
        ({"grid": 1}, 1),
        ({"grid": 12, "width": 96}, 4),
        ({"grid": 12, "width": 96, "projector_head_dim": 32}, 3),
        ({"grid": 9, "width": 144, "projector_head_dim": 16}, 3),
        ({"grid": 6, "width": 256, "projector_head_dim": 32}, 2),
        ({"grid": 6, "width": 288, "projector_head_dim": 32}, 3),
        ({"grid": 12, "levels": 1}, 2),
        ({"grid": 12, "levels": 2}, 2),
        ({"grid": 12, "levels": 4}, 3),
        ({"grid": 12, "levels": 5}, 4),
        ({"grid": 12, "delta_rank": 1}, 3),
        ({"grid": 12, "delta_rank": 32}, 3),
        ({"grid": 12, "projector_num_attention_heads": 4}, 2),
        ({"grid": 12, "projector_num_attention_heads": 32}, 2),
        ({"grid": 12, "projector_head_dim": 4}, 2),
        ({"grid": 12, "projector_mix_ratio": 0.25}, 2),
        ({"grid": 12, "projector_mix_ratio": 0.01}, 2),
        ({"grid": 12, "projector_mix_ratio": 0.99}, 2),
        ({"grid": 12, "projector_mlp_ratio": 3}, 2),
        ({"grid": 12, "hidden": 40}, 2),
    ],
    ids=str,
)
def test_other_sizes_meet_the_oracle(sizes: dict, scale_factor: int) -> None:
    assert_meets_oracle(projector_config(**sizes), scale_factor)


@pytest.mark.parametrize(
    "width, head_dim, mix_ratio, expected",
    [
        (1024, 32, 0.75, 768),
        (1152, 32, 0.75, 864),
        (768, 32, 0.75, 576),
        (96, 32, 0.75, 64),
        (64, 32, 0.75, 32),
        (1024, 32, 0.5, 512),
        (64, 8, 0.25, 16),
        (64, 8, 0.01, 8),
        (64, 8, 0.99, 56),
    ],
)
def test_attention_takes_its_share_in_whole_heads(width: int, head_dim: int, mix_ratio: float, expected: int) -> None:
    """The share that the config asks for, but at least one head for the attention and one for the convolution."""
    with torch.device("meta"):
        module = make_projector(
            projector_config(width=width, projector_head_dim=head_dim, projector_mix_ratio=mix_ratio)
        )
    assert module.block.stem.out_features == expected
    assert module.block.conv_attention.group_conv.groups == (width - expected) // head_dim


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 6])
def test_run_time_scale_factor_equals_the_configured_one(scale_factor: int) -> None:
    at_run_time, weights = released_pair(projector_config(grid=6, scale_factor=1))
    configured, _ = released_pair(projector_config(grid=6, scale_factor=scale_factor))
    single, *levels = drawn_inputs(at_run_time.config)
    assert torch.equal(at_run_time(single, levels, scale_factor), configured(single, levels))


def test_images_of_a_batch_do_not_see_each_other() -> None:
    module, _ = released_pair(projector_config(grid=6))
    single, *levels = drawn_inputs(module.config, batch=3)
    alone = [module(single[i : i + 1], [level[i : i + 1] for level in levels], 2) for i in range(3)]
    torch.testing.assert_close(module(single, levels, 2), torch.cat(alone), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------- gradients


def gradients(scale_factor: int) -> dict[str, Tensor]:
    module, _ = released_pair(projector_config(grid=12, projector_drop_path=0.0))
    single, *levels = drawn_inputs(module.config)
    output = module.train()(single, levels, scale_factor)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    assert all(gradient.isfinite().all() for gradient in found.values())
    return found


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 12])
def test_every_gradient_is_finite(scale_factor: int) -> None:
    """Zero gradients have reasons: a softmax ignores what it adds to all scores, and one score altogether.

    So a bias that all keys share never learns; at scale factor 1 a window holds one key, and nothing on the way to the
    scores learns; with one query token (grid over scale factor) the block's attention scores do not either.
    """
    zero = set(KEY_BIASES)
    if scale_factor == 12:
        zero |= {f"block.attention.{role}.{kind}" for role in ("query", "key") for kind in ("weight", "bias")}
    found = gradients(scale_factor)
    largest = max(gradient.abs().max() for gradient in found.values())
    if scale_factor == 1:
        zero |= {name for name in found if name.startswith(("query.", "key.", "block."))}
        for name in ("window_attention.in_proj_weight", "window_attention.in_proj_bias"):
            query, key, value = found[name].chunk(3)
            assert max(query.abs().max(), key.abs().max()) <= 1e-12 * largest
            assert value.abs().max() > 1e-6 * largest
    for name, gradient in found.items():
        if name in zero:
            assert gradient.abs().max() <= 1e-12 * largest, name
        else:
            assert gradient.abs().max() > 1e-6 * largest, name


def test_gradients_are_those_of_the_oracle() -> None:
    module, weights = released_pair(projector_config(grid=6))
    inputs = [x.requires_grad_() for x in drawn_inputs(module.config)]
    weights = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    direction = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (module(inputs[0], inputs[1:], 2) * direction).sum().backward()
    from_module = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    (oracle_output(module.config, weights, inputs, 2) * direction).sum().backward()
    for x, gradient in zip(inputs, from_module, strict=True):
        assert difference(gradient, x.grad) <= FLOAT64_TOLERANCE
    parameters = dict(module.named_parameters())
    for name, tensor in names.package_state_dict({name: tensor.grad for name, tensor in weights.items()}).items():
        if name not in KEY_BIASES:  # zero but for rounding
            assert difference(parameters[name].grad, tensor) <= 10 * FLOAT64_TOLERANCE, name


# ---------------------------------------------------------------------------- ablations of Table 3


def test_without_emhsa_the_block_has_no_global_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = projector_config(grid=6)
    _, weights = released_pair(config)
    ablated = make_projector(projector_config(grid=6, use_emhsa=False)).double().eval()
    load_subset(ablated, weights, absent=("block.attention_norm.", "block.attention."))
    monkeypatch.setattr(oracle, "global_attention", lambda w, x, head_dim: torch.zeros_like(x))
    assert_ablation_meets_oracle(ablated, weights)


def test_without_the_block_queries_go_from_interpolation_to_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    config = projector_config(grid=6)
    _, weights = released_pair(config)
    ablated = make_projector(projector_config(grid=6, use_transformer_block=False)).double().eval()
    load_subset(ablated, weights, absent=("block.",))
    monkeypatch.setattr(oracle, "refinement_block", lambda w, x: {"query_after_ntb": x})
    assert_ablation_meets_oracle(ablated, weights)


def test_without_delta_projection_there_is_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    config = projector_config(grid=6)
    _, weights = released_pair(config)
    ablated = make_projector(projector_config(grid=6, use_delta_projection=False)).double().eval()
    load_subset(ablated, weights, absent=tuple(f"{r}.delta_{f}" for r in ("query", "key", "value") for f in "uv"))
    monkeypatch.setattr(oracle, "effective_weight", lambda base, u, v: base)
    assert_ablation_meets_oracle(ablated, weights)


def load_subset(module: nn.Module, weights: dict[str, Tensor], absent: tuple[str, ...]) -> None:
    """Loads all weights but those under `absent`, strictly: the ablated module has no parameter for them."""
    state = names.package_state_dict(weights)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(absent)}
    assert len(kept) < len(state)
    module.load_state_dict(kept)


def assert_ablation_meets_oracle(module: DeltaLlavaProjector, weights: dict[str, Tensor]) -> None:
    inputs = drawn_inputs(module.config)
    for scale_factor in (1, 2, 3, 6):
        expected = oracle_output(module.config, weights, inputs, scale_factor)
        with torch.no_grad():
            output = module(inputs[0], inputs[1:], scale_factor)
        assert difference(output, expected) <= FLOAT64_TOLERANCE, scale_factor


# ---------------------------------------------------------------------------- the attention interface


def test_emhsa_goes_through_the_attention_interface() -> None:
    calls = []

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs) -> tuple[Tensor, None]:
        calls.append((query.shape, key.shape))
        return eager_attention_forward(module, query, key, value, mask, **kwargs)

    config = projector_config(grid=6, attention="spy")
    AttentionInterface.register("spy", spy)
    try:
        assert_meets_oracle(config, 2)
    finally:
        AttentionInterface._global_mapping.pop("spy")
    assert calls == [((2, 3, 9, 8), (2, 3, 9, 8))]


# ---------------------------------------------------------------------------- refused inputs


def test_bad_inputs_are_refused_by_name() -> None:
    module, _ = released_pair(projector_config(grid=6))
    single, *levels = drawn_inputs(module.config)
    with pytest.raises(ValueError, match="35 patches"):
        module(single[:, 1:], [level[:, 1:] for level in levels], 1)
    with pytest.raises(ValueError, match="scale_factor=4"):
        module(single, levels, 4)
