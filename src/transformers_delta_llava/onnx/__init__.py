"""Export to ONNX: a repo as graphs that run without PyTorch, in Python, Node and browsers."""

from .export import export_onnx


__all__ = ["export_onnx"]
