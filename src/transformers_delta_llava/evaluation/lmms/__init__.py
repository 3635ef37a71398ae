"""What lmms-eval finds of this package: the model `delta_llava`, through an entry point, and a folder of tasks."""

from pathlib import Path
from typing import Any


# For `lmms_eval --include_path`.
TASKS = Path(__file__).parent / "tasks"


def manifest() -> Any:
    """The `ModelManifest` of `lmms_eval --model delta_llava`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("delta_llava", chat_class_path=f"{__name__}.model.DeltaLlavaLmms")


__all__ = ["TASKS", "manifest"]
