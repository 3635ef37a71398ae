"""Plausible mistakes, put into the oracle one at a time: the golden comparison notices each of them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import goldens, oracle
from tests.reference.goldens import MANIFEST, TOLERANCE, difference


Mistake = Callable[[pytest.MonkeyPatch, dict[str, Tensor]], None]


def missed_by(case: str, weights: dict[str, Tensor], window_heads: int | None = None) -> float:
    """How far the oracle's output for the first image of a case is from the golden one."""
    x = {name: tensor[:1] for name, tensor in goldens.inputs(case).items()}
    scale_factor = MANIFEST["cases"][case]["scale_factor"]
    output = oracle.released_projector(weights, **x, scale_factor=scale_factor, window_heads=window_heads)["output"]
    return difference(output, goldens.expected(case)["output"][:1])


def replace(name: str, function: Callable) -> Mistake:
    return lambda patch, weights: patch.setattr(oracle, name, function)


def without_delta(role: str) -> Mistake:
    def apply(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
        weights[f"{role}_proj_1.U"] = torch.zeros_like(weights[f"{role}_proj_1.U"])

    return apply


def rescaled_delta(role: str, factor: float) -> Mistake:
    def apply(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
        weights[f"{role}_proj_1.U"] = weights[f"{role}_proj_1.U"] * factor

    return apply


def untransposed_query_delta(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    u, v = weights["q_proj_1.U"], weights["q_proj_1.V"]
    weights["q_proj_1.U"], weights["q_proj_1.V"] = v.T, u.T


def reversed_levels(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    right = oracle.keys_and_values
    patch.setattr(oracle, "keys_and_values", lambda w, x: right(w, x.unflatten(-1, (4, 1024)).flip(-2).flatten(-2)))


def norm_before_gelu(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    dense = oracle.effective_weight(
        weights[f"{name}.shared_weight.weight"], weights[f"{name}.U"], weights[f"{name}.V"]
    )
    norm = weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"]
    return oracle.gelu(oracle.layer_norm(oracle.linear(x, dense), *norm, oracle.DELTA_EPS))


def swapped_halves(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    right = oracle.position_table
    patch.setattr(oracle, "position_table", lambda grid, width: right(grid, width).roll(width // 2, dims=-1))


def interleaved_positions(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    right = oracle.position_table
    patch.setattr(
        oracle,
        "position_table",
        lambda grid, width: right(grid, width).reshape(-1, 2, 2, width // 4).transpose(-1, -2).flatten(1),
    )


def resized(mode: str, **options) -> Callable[[Tensor, int], Tensor]:
    """A resize of (N, C) or (B, N, C) tokens with other settings than the released ones."""

    def resize(tokens: Tensor, side: int) -> Tensor:
        batched = tokens if tokens.ndim == 3 else tokens[None]
        grid = oracle.grid_side(batched)
        image = batched.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=(side, side), mode=mode, **options)
        return image.flatten(2).transpose(1, 2).reshape(*tokens.shape[:-2], side * side, -1)

    return resize


def one_block_norm(dropped: str) -> Mistake:
    """LayerNorm without effect for one of the two that are stacked: the one with the gain `dropped`."""

    def apply(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
        right, gain = oracle.layer_norm, weights[oracle.BLOCK + dropped + ".weight"]

        def skip(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            return x if torch.equal(weight, gain) else right(x, weight, bias, eps)

        patch.setattr(oracle, "layer_norm", skip)

    return apply


def query_residual(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    right = oracle.window_attention
    patch.setattr(oracle, "window_attention", lambda w, q, k, v, s, heads: q + right(w, q, k, v, s, heads))


def transposed_windows(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    def flip(x: Tensor) -> Tensor:
        side = oracle.grid_side(x)
        return x.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)

    right = oracle.window_attention
    patch.setattr(oracle, "window_attention", lambda w, q, k, v, s, heads: right(w, q, flip(k), flip(v), s, heads))


def swapped_packed_projection(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    for name in ("clip_attn.in_proj_weight", "clip_attn.in_proj_bias"):
        q, k, v = weights[name].chunk(3)
        weights[name] = torch.cat([k, q, v])


def local_without_residual(patch: pytest.MonkeyPatch, weights: dict[str, Tensor]) -> None:
    right = oracle.local_branch

    def branch(w: dict[str, Tensor], x: Tensor, grid: int) -> Tensor:
        return right(w, x, grid) - oracle.pointwise(x, w[oracle.BLOCK + "projection.conv.weight"])

    patch.setattr(oracle, "local_branch", branch)


MISTAKES: dict[str, Mistake] = {
    "no delta of q": without_delta("q"),
    "no delta of k": without_delta("k"),
    "no delta of v": without_delta("v"),
    "delta divided by the rank": rescaled_delta("v", 1 / 16),
    "delta of q not transposed": untransposed_query_delta,
    "LayerNorm before GELU": replace("delta_projection", norm_before_gelu),
    "levels in the other order": reversed_levels,
    "tanh GELU": replace("gelu", lambda x: F.gelu(x, approximate="tanh")),
    "GELU for ReLU in the block": replace("relu", F.gelu),
    "row and column halves swapped": swapped_halves,
    "sine and cosine interleaved": interleaved_positions,
    "positions rebuilt for the small grid": replace(
        "resize_positions", lambda table, side: oracle.position_table(side, table.shape[-1])
    ),
    "positions antialiased": replace("resize_positions", resized("bicubic", antialias=True)),
    "positions bilinear": replace("resize_positions", resized("bilinear")),
    "queries antialiased": replace("resize_queries", resized("bilinear", antialias=True)),
    "queries with aligned corners": replace("resize_queries", resized("bilinear", align_corners=True)),
    "norm_mhsa missing": one_block_norm("norm_mhsa"),
    "e_mhsa.norm missing": one_block_norm("e_mhsa.norm"),
    "MHCA without its residual": local_without_residual,
    "query added to the attention": query_residual,
    "windows transposed": transposed_windows,
    "packed projection in the order k, q, v": swapped_packed_projection,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_misses_the_golden(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = dict(goldens.weights())
    MISTAKES[mistake](monkeypatch, weights)
    assert missed_by("s2", weights) > 10 * TOLERANCE


def test_sixteen_window_heads_miss_the_golden() -> None:
    assert missed_by("s2", goldens.weights(), window_heads=16) > 10 * TOLERANCE


@pytest.mark.parametrize("constant, value", [("DELTA_EPS", 1e-5), ("BLOCK_EPS", 1e-6)])
def test_a_wrong_eps_misses_the_small_golden(constant: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, constant, value)
    assert missed_by("s2_small", goldens.weights()) > 10 * TOLERANCE
