"""From a trained checkpoint in the authors' layout to a Hub repo, and to the Hub."""

from .config_map import convert_config
from .convert import convert_checkpoint
from .errors import ConversionError
from .key_map import convert_state_dict
from .publish import PushReport, push_folder
from .report import ConversionReport


__all__ = [
    "ConversionError",
    "ConversionReport",
    "PushReport",
    "convert_checkpoint",
    "convert_config",
    "convert_state_dict",
    "push_folder",
]
