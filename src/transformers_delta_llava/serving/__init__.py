"""Serving: `transformers serve` with what it lacks for Delta-LLaVA, and a page to ask a model by hand."""

from .app import build_app, launch_app, write_space
from .transformers_serve import serve


__all__ = ["build_app", "launch_app", "serve", "write_space"]
