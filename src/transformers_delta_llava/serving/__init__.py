"""Serving: `transformers serve` with what it lacks for Delta-LLaVA, and a demo app."""

from .app import build_app, launch_app, write_space
from .transformers_serve import serve


__all__ = ["build_app", "launch_app", "serve", "write_space"]
