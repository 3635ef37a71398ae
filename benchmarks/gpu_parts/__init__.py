"""The parts of `on_gpu.py`, in order of worth, with their time limits in seconds; and what needs no PyTorch."""

import json
from pathlib import Path
from typing import Any


# In this order: what the paper claims and its targets first. All limits together are more than there is, as few parts need theirs.
LIMITS: dict[str, float] = {
    "end_to_end": 190.0,
    "projector": 75.0,
    "correctness": 90.0,
    "training_step": 110.0,
    "quantised": 50.0,
    "end_to_end_13b": 50.0,
    "generate_compiled": 90.0,
}
NO_DEVICE = 3  # exit code of a part that finds no GPU


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
