"""One question at every number of visual tokens: the answers, and what they cost."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from ..modeling import DeltaLlavaForConditionalGeneration
from ..modeling.delta_repo_delta_llava import dtype_name
from ..processing import DeltaLlavaProcessor
from ..utils.prompts import max_prompt_tokens
from .inference import count_visual_tokens, encode_question


@dataclass(frozen=True)
class BudgetRun:
    """
    The answer with so many visual tokens, and the milliseconds it took.

    `tower_ms` is the vision tower's part of `first_token_ms`, which is part of `total_ms`. `loss` is the share of the
    image's variance that the rule of `num_visual_tokens="auto"` takes to be lost, `chosen_by_auto` whether that rule
    chose this budget. `prompt_tokens` counts text and visual tokens.
    """

    num_visual_tokens: int
    prompt_tokens: int
    answer: str
    answer_tokens: int
    tower_ms: float
    first_token_ms: float
    total_ms: float
    loss: float
    chosen_by_auto: bool


@dataclass(frozen=True)
class BudgetComparison:
    """The runs of one image and one prompt, with what is needed to repeat them."""

    prompt: str
    runs: list[BudgetRun]
    auto_max_loss: float
    repeats: int
    max_new_tokens: int
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]

    @property
    def times(self) -> str:
        """What the times include, in words."""
        return (
            f"Medians of {self.repeats} runs after a warm-up, batch of one. The times are the model's: the first token "
            "takes the vision tower, the projector and the language model over the whole prompt; the total takes every "
            "token of the answer. Reading and resizing the image, and tokenizing, are not included."
        )

    def to_dict(self) -> dict[str, Any]:
        """What a JSON report holds."""
        return {**asdict(self), "times": self.times}


def compare_budgets(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    image: Image.Image,
    prompt: str,
    budgets: Sequence[int | str] | None = None,
    auto_max_loss: float | None = None,
    max_new_tokens: int = 64,
    repeats: int = 3,
    on_run: Callable[[], None] | None = None,
) -> BudgetComparison:
    """
    Ask `prompt` about `image` once per budget, greedily, through the processor's chat template.

    Args:
        model: on any device, in evaluation mode.
        processor: its own.
        image: any image.
        prompt: what to ask.
        budgets: numbers of visual tokens, or `"auto"`; all that the processor has when `None`.
        auto_max_loss: what `"auto"` may lose; the processor's default when `None`.
        max_new_tokens: length of the longest answer.
        repeats: timed runs of each budget, taken in turns, so that a machine that slows down slows all alike.
        on_run: called after each run, warm-ups included: (1 + repeats) times per budget.

    Raises:
        ValueError: a budget that the processor does not have, a length or a number of runs below 1, an image that
            cannot be used, or a prompt longer than the model's positions.
    """
    for name, number in (("max_new_tokens", max_new_tokens), ("repeats", repeats)):
        if number < 1:
            raise ValueError(f"{name}={number}: use at least 1.")
    (losses,) = processor.image_losses(image)
    limit = max_prompt_tokens(model.config)
    inputs: dict[int, Any] = {}
    for budget in budgets or processor.visual_token_budgets:
        encoded = encode_question(processor, image, prompt, budget, auto_max_loss, limit)
        inputs.setdefault(count_visual_tokens(processor, encoded), encoded.to(model.device, model.dtype))
    chosen = count_visual_tokens(processor, encode_question(processor, image, prompt, "auto", auto_max_loss, limit))

    timed: dict[int, list[TimingStreamer]] = {budget: [] for budget in inputs}
    for repeat in range(1 + repeats):
        for budget in inputs:
            timed[budget].append(
                _generate(model, inputs[budget], max_new_tokens if repeat else min(2, max_new_tokens))
            )
            if on_run is not None:
                on_run()

    runs = []
    for budget, (_, *streamers) in sorted(timed.items(), reverse=True):
        tower, first, total = (statistics.median(times) for times in zip(*(s.times() for s in streamers)))
        tokens = streamers[-1].tokens
        runs.append(
            BudgetRun(
                num_visual_tokens=budget,
                prompt_tokens=inputs[budget]["input_ids"].shape[1],
                answer=processor.decode(tokens, skip_special_tokens=True).strip(),
                answer_tokens=len(tokens),
                tower_ms=tower,
                first_token_ms=first,
                total_ms=total,
                loss=losses[budget],
                chosen_by_auto=budget == chosen,
            )
        )
    return BudgetComparison(
        prompt,
        runs,
        processor.auto_max_loss if auto_max_loss is None else auto_max_loss,
        repeats,
        max_new_tokens,
        str(model.device),
        dtype_name(model.dtype),
        torch.get_num_threads(),
        {"torch": torch.__version__, "transformers": transformers.__version__},
    )


class TimingStreamer(BaseStreamer):
    """Takes the time of every token of an answer; their ids are in `tokens`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokens: list[int] = []
        self.marks: list[float] = []
        self.prompt_is_next = True
        self.start = self.tower_end = self.now()

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark_tower(self, *_: Any) -> None:
        """Hook of the projector: what it reads is there."""
        self.tower_end = self.now()

    def put(self, value: torch.Tensor) -> None:
        """Take the ids of the prompt, then those of each step."""
        if not self.prompt_is_next:
            self.marks.append(self.now())
            self.tokens += value.flatten().tolist()
        self.prompt_is_next = False

    def end(self) -> None:
        """Nothing is left to do."""

    def times(self) -> tuple[float, float, float]:
        """Milliseconds to the end of the tower, to the first token, to the last."""
        tower, first, last = (1000 * (mark - self.start) for mark in (self.tower_end, self.marks[0], self.marks[-1]))
        return tower, first, last


@torch.inference_mode()
def _generate(model: DeltaLlavaForConditionalGeneration, inputs: Any, max_new_tokens: int) -> TimingStreamer:
    streamer = TimingStreamer(model.device)
    hook = model.model.multi_modal_projector.register_forward_pre_hook(streamer.mark_tower)
    try:
        streamer.start = streamer.now()
        model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, streamer=streamer)
    finally:
        hook.remove()
    return streamer
