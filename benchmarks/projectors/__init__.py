"""Projectors to compare Delta-LLaVA's with, written for these benchmarks from the papers' descriptions."""

from .baselines import AveragePoolingProjector, MLPProjector, TokenPackerStyleProjector


__all__ = ["AveragePoolingProjector", "MLPProjector", "TokenPackerStyleProjector"]
