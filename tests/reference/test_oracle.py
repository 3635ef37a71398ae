"""The oracle meets the golden numbers, and its two resizes meet hand-written kernels."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.reference import goldens, names, oracle
from tests.reference.goldens import MANIFEST, TOLERANCE, difference


def run(case: str) -> dict[str, Tensor]:
    scale_factor = MANIFEST["cases"][case]["scale_factor"]
    return oracle.released_projector(goldens.weights(), **goldens.inputs(case), scale_factor=scale_factor)


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
    shapes = names.parameter_shapes(
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
