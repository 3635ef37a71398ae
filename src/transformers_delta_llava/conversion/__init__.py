"""From a trained checkpoint in the authors' layout to a Hub repo, and back."""

from .config import convert_config
from .convert import ConversionReport, convert_checkpoint
from .export import ExportReport, export_checkpoint
from .inspection import Inspection, inspect_model
from .names import convert_state_dict


__all__ = [
    "ConversionReport",
    "ExportReport",
    "Inspection",
    "convert_checkpoint",
    "convert_config",
    "convert_state_dict",
    "export_checkpoint",
    "inspect_model",
]
