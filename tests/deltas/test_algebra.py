"""Against dense singular value decompositions."""

import pytest
import torch

from transformers_delta_llava.deltas.algebra import decompose, decompose_product, squared_error, squared_norm


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(40, 6, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 6),
        torch.randn(6, 24, generator=generator, dtype=torch.float64),
    )


def test_decomposition_of_a_product_is_that_of_the_dense_matrix(pair):
    part, dense = decompose_product(*pair), decompose(pair[0] @ pair[1])
    torch.testing.assert_close(part.values, dense.values[:6])
    torch.testing.assert_close((part.left * part.values) @ part.right, pair[0] @ pair[1])


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_factors_are_the_best_of_their_rank(pair, rank):
    part, product = decompose_product(*pair), pair[0] @ pair[1]
    u, v = part.factors(rank)
    lost = (product - u @ v).square().sum()
    torch.testing.assert_close(lost, part.values[rank:].square().sum(), atol=1e-18, rtol=1e-6)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))


def test_factors_past_the_rank_are_zero(pair):
    u, v = decompose_product(*pair).factors(9)
    assert not u[:, 6:].any() and not v[6:].any()
    torch.testing.assert_close(u @ v, pair[0] @ pair[1])


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1 - 1e-9])
def test_rank_for_an_energy_is_the_lowest(pair, energy):
    part = decompose_product(*pair)
    rank = part.rank_for(energy)
    kept = part.values.square().cumsum(0) / part.values.square().sum()
    assert kept[rank - 1] >= energy and (rank == 1 or kept[rank - 2] < energy)


def test_rank_for_edge_cases(pair):
    assert decompose_product(*pair).rank_for(1.0) == 6
    assert decompose_product(pair[0] * 0, pair[1]).rank_for(0.5) == 1


def test_norms_without_the_product(pair):
    other = pair[0] + 0.1, pair[1] * 0.9
    torch.testing.assert_close(squared_norm(*pair), float((pair[0] @ pair[1]).square().sum()))
    expected = float((pair[0] @ pair[1] - other[0] @ other[1]).square().sum())
    torch.testing.assert_close(squared_error(pair, other), expected)
    assert squared_error(pair, pair) < 1e-15 * squared_norm(*pair)
