"""Serving: `transformers serve` with what it lacks for Delta-LLaVA."""

from .transformers_serve import serve


__all__ = ["serve"]
