"""Answers to one question at a time, streamed while they are generated, with the time they took."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ..analysis import Explanation, explain
from ..analysis.figures import count
from ..analysis.inference import count_visual_tokens, encode_question
from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.prompts import max_prompt_tokens


@dataclass(frozen=True)
class StreamedAnswer:
    """
    An answer as far as it is generated.

    `first_token_s` and `total_s` are seconds since generation was taken up, reading the image included; `first_token_s`
    is `None` before there is a token. `answer_tokens` counts the token that ends the answer, too.
    """

    text: str
    num_visual_tokens: int
    answer_tokens: int
    first_token_s: float | None
    total_s: float

    def __str__(self) -> str:
        """Costs in one line."""
        costs = count(self.num_visual_tokens, "visual token")
        if self.first_token_s is not None:
            first, total = format_seconds(self.first_token_s), format_seconds(self.total_s)
            costs += f" · first token after {first} · {count(self.answer_tokens, 'token')} in {total}"
        return costs


class Conversation:
    """
    A model that several threads may ask; their questions are answered one after the other.

    Args:
        model: on any device, in evaluation mode.
        processor: its own.
        max_new_tokens: length of the longest answer.
    """

    def __init__(
        self, model: DeltaLlavaForConditionalGeneration, processor: DeltaLlavaProcessor, max_new_tokens: int = 256
    ) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self._lock = threading.Lock()

    def ask(self, image: Image.Image, prompt: str, num_visual_tokens: int | None = None) -> Iterator[StreamedAnswer]:
        """
        The answer, each time longer, and at last whole. Closing the iterator stops the model after its next token.

        Raises:
            ValueError: no question, one that is longer than the model's positions, a budget that the model does not
                have, or an image that cannot be used.
            Exception: whatever generation raises in its thread.
        """
        if not prompt.strip():
            raise ValueError("There is no question.")
        streamer = AnswerStreamer(self.processor)

        def generate() -> None:
            try:
                with self._lock:
                    streamer.started = time.perf_counter()
                    limit = max_prompt_tokens(self.model.config)
                    inputs = encode_question(
                        self.processor, image, prompt.strip(), num_visual_tokens, max_tokens=limit
                    )
                    streamer.num_visual_tokens = count_visual_tokens(self.processor, inputs)
                    self.model.generate(
                        **inputs.to(self.model.device, self.model.dtype),
                        max_new_tokens=self.max_new_tokens,
                        do_sample=False,
                        num_beams=1,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([StopOnEvent(streamer.cancelled)]),
                    )
            except BaseException as error:  # it is raised again in the thread that asked
                streamer.error = error
            finally:
                streamer.close()

        threading.Thread(target=generate, daemon=True).start()
        text = ""
        try:
            for piece in streamer:
                if piece:
                    text += piece
                    yield streamer.answer(text)
        finally:
            streamer.cancelled.set()
        if streamer.error is not None:
            raise streamer.error
        yield streamer.answer(text.strip())

    def explain(
        self,
        image: Image.Image,
        prompt: str,
        num_visual_tokens: int | None = None,
        word: str = "",
        on: str = "patches",
    ) -> Explanation:
        """
        The saliency for `word` of the answer, by default for its first token, at the tower's `"patches"` or at the
        `"visual_tokens"`; a single visual token would show nothing, so the patches are taken then.

        Raises:
            ValueError: as `ask` does, or an answer that does not have the word.
        """
        budget = self.processor.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
        with self._lock:
            return explain(
                self.model,
                self.processor,
                image,
                prompt.strip(),
                num_visual_tokens=num_visual_tokens,
                token=word.strip() or 0,
                on="patches" if budget == 1 else on,
                max_new_tokens=self.max_new_tokens if word.strip() else 1,  # the first token needs no others
            )


class AnswerStreamer(TextIteratorStreamer):
    """Passes text from the generating thread to the one that asked, until `close`, and takes the times."""

    def __init__(self, processor: DeltaLlavaProcessor) -> None:
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.num_visual_tokens = self.answer_tokens = 0
        self.first: float | None = None
        self.started = self.last = time.perf_counter()
        self.cancelled = threading.Event()
        self.error: BaseException | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the ids of the prompt, then those of each step."""
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.answer_tokens += value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass text on. The end of generation does not end the stream: an error may follow it, or replace it."""
        super().on_finalized_text(text)

    def close(self) -> None:
        """End the iteration."""
        self.text_queue.put(self.stop_signal)

    def answer(self, text: str) -> StreamedAnswer:
        """The answer that `text` is, with its costs so far."""
        first = None if self.first is None else self.first - self.started
        return StreamedAnswer(text, self.num_visual_tokens, self.answer_tokens, first, self.last - self.started)


class StopOnEvent(StoppingCriteria):
    """Stops generation once `event` is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def format_seconds(seconds: float) -> str:
    """In milliseconds below one second."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
