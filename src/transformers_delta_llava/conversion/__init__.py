"""From a trained checkpoint in the released layout to a Hub repo, and back."""

from .convert import ConversionReport, convert_checkpoint
from .export import ExportReport, export_checkpoint
from .inspection import Inspection, inspect_model
from .names import convert_state_dict


__all__ = [
    "ConversionReport",
    "ExportReport",
    "Inspection",
    "convert_checkpoint",
    "convert_state_dict",
    "export_checkpoint",
    "inspect_model",
]
