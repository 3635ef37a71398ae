"""Errors of the conversion."""

from ..utils.errors import DeltaLlavaError as ConversionError
from ..utils.errors import format_names as listed


__all__ = ["ConversionError", "listed"]
