"""Projectors to compare Delta-LLaVA's with: others' from their papers' descriptions, and its own as released."""

from .baselines import AveragePoolingProjector, MLPProjector, TokenPackerStyleProjector
from .released import ReleasedProjector


__all__ = ["AveragePoolingProjector", "MLPProjector", "ReleasedProjector", "TokenPackerStyleProjector"]
