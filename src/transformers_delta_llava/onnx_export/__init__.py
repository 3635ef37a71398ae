"""ONNX: a repo as graphs that run without PyTorch, in Python, Node and browsers."""

from .export import OnnxReport, export_onnx


__all__ = ["OnnxReport", "export_onnx"]
