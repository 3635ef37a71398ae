"""Answers to one question at a time, piece by piece as they are generated, with the time they took."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ..analysis import Explanation, explain
from ..analysis.inference import count_visual_tokens, encode_question
from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.prompts import max_prompt_tokens


@dataclass(frozen=True)
class Said:
    """
    An answer as far as it goes.

    The times are seconds since the question was taken up, reading the picture included; `first_token` is `None` before
    there is one, and `answer_tokens` counts the end of the text, too.
    """

    text: str
    visual_tokens: int
    answer_tokens: int
    first_token: float | None
    so_far: float

    def __str__(self) -> str:
        """What a page shows below the answer."""
        spent = f"{count(self.visual_tokens, 'visual token')}"
        if self.first_token is None:
            return spent
        first, so_far = duration(self.first_token), duration(self.so_far)
        return f"{spent} · first token after {first} · {count(self.answer_tokens, 'token')} in {so_far}"


class Conversation:
    """
    A model that is asked by several threads, one after the other: what one of them asks never meets what another does.

    Args:
        model: on any device, in evaluation mode.
        processor: its own.
        max_new_tokens: length of the longest answer.
    """

    def __init__(
        self, model: DeltaLlavaForConditionalGeneration, processor: DeltaLlavaProcessor, max_new_tokens: int = 256
    ) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self._one_at_a_time = threading.Lock()

    def ask(self, picture: Image.Image, question: str, num_visual_tokens: int | None = None) -> Iterator[Said]:
        """
        The answer, each time longer, and at last whole. Who stops iterating stops the model after its next token.

        Raises:
            ValueError: no question, one that is longer than the model's positions, a budget that the model does not
                have, or what the processor refuses.
            Exception: whatever generation raises in its thread.
        """
        if not question.strip():
            raise ValueError("There is no question.")
        stream = _Stream(self.processor)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                with self._one_at_a_time:
                    stream.started = time.perf_counter()
                    most = max_prompt_tokens(self.model.config)
                    inputs = encode_question(
                        self.processor, picture, question.strip(), num_visual_tokens, max_tokens=most
                    )
                    stream.visual_tokens = count_visual_tokens(self.processor, inputs)
                    self.model.generate(
                        **inputs.to(self.model.device, self.model.dtype),
                        max_new_tokens=self.max_new_tokens,
                        do_sample=False,
                        num_beams=1,
                        streamer=stream,
                        stopping_criteria=StoppingCriteriaList([_WhenSet(stream.unwanted)]),
                    )
            except BaseException as error:  # it is raised again where it is seen
                errors.append(error)
            finally:
                stream.close()

        threading.Thread(target=work, daemon=True).start()
        text = ""
        try:
            for piece in stream:
                if piece:
                    text += piece
                    yield stream.said(text)
        finally:
            stream.unwanted.set()
        if errors:
            raise errors[0]
        yield stream.said(text.strip())

    def explain(
        self,
        picture: Image.Image,
        question: str,
        num_visual_tokens: int | None = None,
        word: str = "",
        on: str = "patches",
    ) -> Explanation:
        """
        Where `word` of the answer comes from, by default its first token: on the tower's `"patches"` or on the
        `"visual_tokens"`, of which a single one would show nothing, so the patches are taken then.

        Raises:
            ValueError: as `ask` does, or an answer that does not have the word.
        """
        spent = self.processor.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
        with self._one_at_a_time:
            return explain(
                self.model,
                self.processor,
                picture,
                question.strip(),
                num_visual_tokens=num_visual_tokens,
                token=word.strip() or 0,
                on="patches" if spent == 1 else on,
                max_new_tokens=self.max_new_tokens if word.strip() else 1,  # what follows the token does not matter
            )


class _Stream(TextIteratorStreamer):
    """Text from one thread to another, until `close`; it takes the times."""

    def __init__(self, processor: DeltaLlavaProcessor) -> None:
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.visual_tokens = self.answer_tokens = 0
        self.first: float | None = None
        self.started = self.last = time.perf_counter()
        self.unwanted = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        """Take the ids of the prompt, then those of each step."""
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.answer_tokens += value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand text over. The end of generation does not end the stream: an error may follow it, or come in its place."""
        super().on_finalized_text(text)

    def close(self) -> None:
        """End the iteration."""
        self.text_queue.put(self.stop_signal)

    def said(self, text: str) -> Said:
        """The answer that `text` is, with what it took."""
        first = None if self.first is None else self.first - self.started
        return Said(text, self.visual_tokens, self.answer_tokens, first, self.last - self.started)


class _WhenSet(StoppingCriteria):
    """Stops generation when nobody listens any more."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def count(number: int, thing: str) -> str:
    """`number` of `thing`, in the plural where it takes one."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def duration(seconds: float) -> str:
    """In milliseconds, from one second on in seconds."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
