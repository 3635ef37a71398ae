"""What the trainer adds to its log: throughput, memory, and statistics of the visual tokens."""

import resource
import sys
import time
from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..modeling import DeltaLlavaProjector


COUNTS = ("num_tokens", "num_images", "num_skipped")


class Throughput:
    """Counts tokens, images and skipped rows from one report to the next, over all processes."""

    def __init__(self) -> None:
        self.total_skipped = 0
        self.start()

    def start(self) -> None:
        """Set counts to zero and restart the clock."""
        self._counts: Counter[str] = Counter()
        self._start = time.perf_counter()

    def add(self, counts: dict[str, int]) -> None:
        """Add the counts of a batch."""
        self._counts.update(counts)

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Rates since the last report, and the peak memory of any process, in GiB; restarts."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        counts = torch.tensor([self._counts[n] for n in COUNTS], dtype=torch.float32, device=accelerator.device)
        memory = torch.tensor([peak_memory(accelerator.device)], device=accelerator.device)
        tokens, images, skipped = accelerator.reduce(counts, "sum").tolist()
        self.total_skipped += int(skipped)
        rates = {
            "tokens_per_second": round(tokens / seconds, 1),
            "images_per_second": round(images / seconds, 2),
            "memory_gib": round(accelerator.gather(memory).max().item() / 2**30, 3),
        }
        self.start()
        return rates | ({"rows_skipped": self.total_skipped} if self.total_skipped else {})


def peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: of the GPU, or else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class VisualTokenLog:
    """Size of the last step's visual tokens beside the text's embeddings.

    Visual tokens much larger or smaller than text, or nearly the same for all images, point to a bad start or too high a
    learning rate.
    """

    def __init__(self, model: nn.Module):
        self.model, self.tokens = model, None
        self.shows_images = True  # a batch without any has a blank one, which is masked
        for module in model.modules():
            if isinstance(module, DeltaLlavaProjector):
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.shows_images and not torch.compiler.is_compiling():
            self.tokens = output.detach()

    def report(self) -> dict[str, float]:
        """Root mean square of the visual tokens, and of their deviation from the mean over images.

        Both are in units of the input embeddings' root mean square. Empty where no image was seen, or the embeddings are
        sharded.
        """
        weight = self.model.get_input_embeddings().weight
        if self.tokens is None or not weight.numel():
            return {}
        tokens, text = self.tokens.float(), weight.detach()[:: max(1, len(weight) // 4096)].float()
        text_rms = text.square().mean().sqrt().item()
        values = {"visual_token_rms": tokens, "visual_token_spread": tokens - tokens.mean(0)}
        return {name: round(value.square().mean().sqrt().item() / text_rms, 4) for name, value in values.items()}
