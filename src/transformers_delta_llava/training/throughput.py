"""How fast a run is, and how much memory it takes."""

import resource
import sys
import time

import torch
from accelerate import Accelerator


COUNTS = ("num_tokens", "num_images", "num_skipped")


class Throughput:
    """Counts what goes through a model, between one report and the next, on all processes together."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(COUNTS, 0)
        self._start = time.perf_counter()
        self.total_skipped = 0

    def start(self) -> None:
        """Begin to count time."""
        self._start = time.perf_counter()

    def add(self, counts: dict[str, int]) -> None:
        """Add a batch's counts."""
        for name in COUNTS:
            self._counts[name] += counts[name]

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Rates since the last report, and the most memory taken on any process so far, in GiB."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float32, device=accelerator.device)
        memory = torch.tensor([peak_memory(accelerator.device)], device=accelerator.device)
        tokens, images, skipped = accelerator.reduce(counts, "sum").tolist()
        self.total_skipped += int(skipped)
        rates = {
            "tokens_per_second": round(tokens / seconds, 1),
            "images_per_second": round(images / seconds, 2),
            "memory_gib": round(accelerator.gather(memory).max().item() / 2**30, 3),
        }
        if self.total_skipped:
            rates["rows_skipped"] = self.total_skipped
        self._reset()
        return rates

    def _reset(self) -> None:
        self._counts = dict.fromkeys(COUNTS, 0)
        self._start = time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """Most bytes taken so far: of the GPU's memory, or else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
