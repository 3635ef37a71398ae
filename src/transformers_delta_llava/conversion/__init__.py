"""From a trained checkpoint in the authors' layout to a Hub repo and to the Hub, and back."""

from .config_map import convert_config
from .convert import convert_checkpoint
from .errors import ConversionError
from .export import ExportReport, export_checkpoint
from .inspection import Inspection, inspect_model
from .key_map import convert_state_dict
from .publish import PushReport, push_folder
from .repo_code import CodeUpdate, update_code
from .report import ConversionReport


__all__ = [
    "CodeUpdate",
    "ConversionError",
    "ConversionReport",
    "ExportReport",
    "Inspection",
    "PushReport",
    "convert_checkpoint",
    "convert_config",
    "convert_state_dict",
    "export_checkpoint",
    "inspect_model",
    "push_folder",
    "update_code",
]
