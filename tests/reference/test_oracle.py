"""The oracle meets the golden numbers; the oracle with a plausible mistake in it does not."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import goldens, oracle
from tests.reference.goldens import MANIFEST, TOLERANCE, difference

Mistake = Callable[[pytest.MonkeyPatch, dict[str, Tensor]], None]


def run(
    case: str, images: slice = slice(None), weights: dict[str, Tensor] | None = None, **options
) -> dict[str, Tensor]:
    x = goldens.inputs(case)
    scale_factor = MANIFEST["cases"][case]["scale_factor"]
    return oracle.released_projector(
        goldens.weights() if weights is None else weights,
        x["x_single"][images],
        x["x_multi"][images],
        scale_factor,
        **options,
    )


# ---------------------------------------------------------------------------- the fixtures themselves


@pytest.mark.parametrize("case", goldens.CASES)
def test_golden_files_are_the_published_ones(case: str) -> None:
    assert goldens.sha256(case) == MANIFEST["cases"][case]["sha256"]


def test_weights_have_the_published_values() -> None:
    weights = goldens.weights()
    assert len(weights) == len(MANIFEST["parameters"]) == 45
    for entry in MANIFEST["parameters"]:
        value = weights[entry["name"].removeprefix(goldens.PREFIX)]
        check = entry["check"]
        assert list(value.shape) == entry["shape"]
        assert value.flatten()[0].item() == check["first"]
        assert value.flatten()[-1].item() == check["last"]
        assert value.double().sum().item() == pytest.approx(check["sum"], rel=1e-9, abs=1e-9)


def test_shapes_of_any_size_give_the_manifest_at_its_size() -> None:
    shapes = oracle.parameter_shapes(
        width=1024, levels=4, rank=16, attention_width=768, head_dim=32, mlp_ratio=2, hidden=64
    )
    manifest = {e["name"].removeprefix(goldens.PREFIX): tuple(e["shape"]) for e in MANIFEST["parameters"]}
    assert shapes == manifest
    assert sum(math.prod(shape) for shape in shapes.values()) == MANIFEST["geometry"]["parameter_count"]


# ---------------------------------------------------------------------------- parity


@pytest.mark.parametrize("case", goldens.CASES)
def test_oracle_meets_the_goldens(case: str) -> None:
    named, golden = run(case), goldens.expected(case)
    stored = set(MANIFEST["cases"][case]["tensors"])
    assert stored == set(golden) - {"query_token_index", "kv_token_index"}
    for name in stored:
        actual = goldens.stored_tokens(name, named[name]) if case == "s2" else named[name]
        assert difference(actual, golden[name]) <= TOLERANCE, name


def test_float64_oracle_meets_the_golden_to_its_noise_floor() -> None:
    x = {name: tensor.double() for name, tensor in goldens.inputs("s24").items()}
    output = oracle.released_projector(goldens.weights(), **x, scale_factor=24)["output"]
    noise = MANIFEST["cases"]["s24"]["tensors"]["output"]["float32_noise_max_abs"]
    assert output.dtype == torch.float64
    assert (output - goldens.expected("s24")["output"]).abs().max().item() <= 2 * noise


# ---------------------------------------------------------------------------- resizes, by hand


def linear_kernel(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def cubic_kernel(x: float) -> float:
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resize_matrix(source: int, target: int, kernel: Callable[[float], float]) -> Tensor:
    """(target, source) weights of a half-pixel resize without antialiasing, borders repeated."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), source - 1)] += kernel(centre - j)
    return matrix


@pytest.mark.parametrize("grid, side", [(24, 24), (24, 12), (24, 8), (24, 6), (24, 1), (27, 9), (16, 8), (5, 1)])
def test_resizes_equal_hand_written_kernels(grid: int, side: int) -> None:
    tokens = torch.randn(2, grid * grid, 8, generator=torch.Generator().manual_seed(0)).double()
    image = tokens.reshape(2, grid, grid, 8)
    for resize, kernel in ((oracle.resize_queries, linear_kernel), (resize_positions_batched, cubic_kernel)):
        matrix = resize_matrix(grid, side, kernel)
        by_hand = torch.einsum("ri,cj,bijk->brck", matrix, matrix, image).reshape(2, side * side, 8)
        torch.testing.assert_close(resize(tokens, side), by_hand, rtol=0, atol=1e-12)


def resize_positions_batched(tokens: Tensor, side: int) -> Tensor:
    return torch.stack([oracle.resize_positions(table, side) for table in tokens])


def test_query_is_the_centre_patch_or_the_mean_of_the_four_central_ones() -> None:
    tokens = torch.arange(144, dtype=torch.float64).reshape(1, 144, 1)
    odd = oracle.resize_queries(tokens, 4)
    assert odd[0, 0, 0].item() == 1 * 12 + 1
    even = oracle.resize_queries(tokens, 3)
    assert even[0, 0, 0].item() == pytest.approx(sum(i * 12 + j for i in (1, 2) for j in (1, 2)) / 4)


# ---------------------------------------------------------------------------- locality


def test_a_patch_reaches_only_the_token_of_its_cell_through_keys_and_values() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = oracle.parameter_shapes(
        width=32, levels=2, rank=2, attention_width=24, head_dim=8, mlp_ratio=2, hidden=16
    )
    weights = {name: torch.randn(shape, generator=generator).double() / 4 for name, shape in shapes.items()}
    single = torch.randn(1, 36, 32, generator=generator).double()
    multi = torch.randn(1, 36, 64, generator=generator).double()
    before = oracle.released_projector(weights, single, multi, scale_factor=3)["output"]
    multi[0, 4 * 6 + 1] += 1  # row 4, column 1: cell (1, 0) of the 2 x 2 query grid
    after = oracle.released_projector(weights, single, multi, scale_factor=3)["output"]
    moved = (before - after).abs().amax(dim=-1)[0] > 0
    assert moved.tolist() == [False, False, True, False]


def test_at_scale_factor_one_queries_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = oracle.parameter_shapes(width=16, levels=1, rank=1, attention_width=8, head_dim=8, mlp_ratio=1, hidden=8)
    weights = {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    multi = torch.randn(1, 9, 16, generator=generator).double()
    one, other = (
        oracle.released_projector(weights, torch.randn(1, 9, 16, generator=generator).double(), multi, 1)["output"]
        for _ in range(2)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------- mistakes that must show


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
    output = run("s2", slice(0, 1), weights)["output"]
    assert difference(output, goldens.expected("s2")["output"][:1]) > 10 * TOLERANCE


def test_sixteen_window_heads_miss_the_golden() -> None:
    output = run("s2", slice(0, 1), window_heads=16)["output"]
    assert difference(output, goldens.expected("s2")["output"][:1]) > 10 * TOLERANCE


@pytest.mark.parametrize("constant, value", [("DELTA_EPS", 1e-5), ("BLOCK_EPS", 1e-6)])
def test_a_wrong_eps_misses_the_small_golden(constant: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, constant, value)
    output = run("s2_small", slice(0, 1))["output"]
    assert difference(output, goldens.expected("s2_small")["output"][:1]) > 10 * TOLERANCE
