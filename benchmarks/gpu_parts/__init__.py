"""The parts of `on_gpu.py`: their order, time limits and entry points. Needs no PyTorch."""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Part(NamedTuple):
    """Seconds that a part may take, and the function `gpu_parts.MODULE.NAME` that runs it."""

    limit: float
    module: str


# The paper's claims and the project's goals first. The limits add up to more than there is, as few parts need theirs.
PARTS: dict[str, Part] = {
    "end_to_end": Part(190.0, "answers"),
    "projector": Part(75.0, "projector_times"),
    "correctness": Part(90.0, "correctness"),
    "training_step": Part(110.0, "training"),
    "quantised": Part(50.0, "quantised"),
    "end_to_end_13b": Part(50.0, "answers"),
    "generate_compiled": Part(90.0, "answers"),
}
NO_DEVICE = 3  # exit code of a part that finds no GPU


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the whole file or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
