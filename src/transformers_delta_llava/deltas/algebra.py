"""Singular values of low-rank updates, and the best update of a given rank; all in float64.

A factor pair is (U, V), (in, r) and (r, out); what it stands for is U V.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Decomposition:
    """A matrix (in, out) as `left * values @ right`, singular values falling, in float64."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor pair (in, rank), (rank, out) of the best approximation, each with the root of the values.

        Past the matrix's own rank the pair is filled with zeros.
        """
        kept = min(rank, len(self.values))
        root = self.values[:kept].sqrt()
        u = self.left.new_zeros(self.left.shape[0], rank)
        v = self.right.new_zeros(rank, self.right.shape[1])
        u[:, :kept], v[:kept] = self.left[:, :kept] * root, root[:, None] * self.right[:kept]
        return u, v

    def rank_for(self, energy: float) -> int:
        """The lowest rank, at least 1, that keeps this share of the squared Frobenius norm."""
        squares = self.values.square()
        missing = squares.flip(0).cumsum(0).flip(0)  # what is lost when only those before are kept
        enough = missing <= (1 - energy) * squares.sum()
        return max(1, int(enough.int().argmax()) if enough.any() else len(squares))


def decompose(matrix: torch.Tensor) -> Decomposition:
    """Of a matrix (in, out)."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Decomposition(left, values, right)


def decompose_product(u: torch.Tensor, v: torch.Tensor) -> Decomposition:
    """Of the product of a factor pair, without forming it."""
    basis_u, core_u = torch.linalg.qr(u.double())
    basis_v, core_v = torch.linalg.qr(v.double().T)
    left, values, right = torch.linalg.svd(core_u @ core_v.T, full_matrices=False)
    return Decomposition(basis_u @ left, values, right @ basis_v.T)


def squared_norm(u: torch.Tensor, v: torch.Tensor) -> float:
    """Squared Frobenius norm of the product of a factor pair, without forming it."""
    u, v = u.double(), v.double()
    return max(0.0, float(((u.T @ u) * (v @ v.T)).sum()))


def squared_error(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Squared Frobenius norm of the difference of two products."""
    return squared_norm(
        torch.cat([one[0].double(), -other[0].double()], 1), torch.cat([one[1].double(), other[1].double()])
    )
