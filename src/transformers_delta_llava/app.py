"""A Gradio demo of a Delta-LLaVA repo: `delta-llava app REPO`.

The file needs gradio and transformers only, so a Space can hold it as `app.py`, with the repo in the variable `DELTA_LLAVA_MODEL`.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)


ABOUT = (
    "Ask about an image. The model sees it as a number of visual tokens: the fewer, the faster, and the less it sees. "
    "The same weights serve every number."
)
# The slider counts through the budgets; the box next to it shows the number of tokens.
CSS = "#budget .tab-like-container, #budget .min_value, #budget .max_value { display: none; }"


class StopOnEvent(StoppingCriteria):
    """Stops generation once `event` is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_answer(
    model: Any, processor: Any, image: Image.Image, question: str, num_visual_tokens: int, max_new_tokens: int
) -> Iterator[tuple[str, str]]:
    """
    The answer so far and what it cost, each time longer. Closing the iterator stops the model after its next token.

    Raises:
        Exception: whatever generation raises in its thread.
    """
    start = time.perf_counter()
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"num_visual_tokens": num_visual_tokens, "return_tensors": "pt"},
    ).to(model.device, model.dtype)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    cancelled, errors = threading.Event(), []

    def generate() -> None:
        try:
            model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([StopOnEvent(cancelled)]),
            )
        except Exception as error:  # raised again by the thread that reads the answer
            errors.append(error)
            streamer.text_queue.put(streamer.stop_signal)

    threading.Thread(target=generate, daemon=True).start()
    text, costs = "", f"{num_visual_tokens} visual token{'s' if num_visual_tokens > 1 else ''}"
    first = None
    try:
        for piece in streamer:
            if piece:
                text += piece
                first = first or time.perf_counter() - start
                total = time.perf_counter() - start
                yield text.lstrip(), f"{costs} · first word after {first:.2f} s · {total:.2f} s in all"
    finally:
        cancelled.set()
    if errors:
        raise errors[0]


def build_app(model: Any, processor: Any, title: str, max_new_tokens: int = 256) -> Any:
    """
    A `gradio.Blocks` that answers one question at a time.

    Args:
        model, processor: of one repo; the model in evaluation mode.
        title: shown on top.
        max_new_tokens: length of the longest answer.
    """
    import gradio

    budgets = sorted(processor.visual_token_budgets)
    default = processor.image_seq_length

    def ask(path: str | None, question: str, num_visual_tokens: int) -> Iterator[tuple[str, str]]:
        if not path or not question.strip():
            raise gradio.Error("Choose an image and type a question first.")
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
            yield from stream_answer(model, processor, image, question.strip(), num_visual_tokens, max_new_tokens)
        except UnidentifiedImageError as error:
            raise gradio.Error("This file is not an image.") from error
        except ValueError as error:  # such as a number of visual tokens that the model does not have
            raise gradio.Error(str(error)) from error

    def enable(path: str | None) -> tuple[Any, Any]:
        try:
            if path:
                with Image.open(path) as file:
                    file.verify()
        except Exception:  # whatever Pillow raises on a file that is not an image
            gradio.Warning("This file is not an image.")
            path = None
        return path, gradio.Button(interactive=path is not None)

    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {title}\n{ABOUT}")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="filepath", sources=["upload", "clipboard"], height=320, elem_id="image")
                question = gradio.Textbox(label="Question", placeholder="What is in this image?", elem_id="question")
                with gradio.Row():
                    slider = gradio.Slider(
                        1,
                        max(2, len(budgets)),
                        1 + budgets.index(default),
                        step=1,
                        label="Fewer or more visual tokens",
                        scale=3,
                        interactive=len(budgets) > 1,
                        elem_id="budget",
                    )
                    tokens = gradio.Number(
                        default, precision=0, label="Visual tokens", interactive=False, elem_id="tokens"
                    )
                button = gradio.Button("Ask", variant="primary", interactive=False, elem_id="ask")
            with gradio.Column():
                answer = gradio.Textbox(label="Answer", interactive=False, lines=3, elem_id="answer")
                costs = gradio.Markdown(elem_id="costs")
        image.change(enable, image, [image, button], show_progress="hidden", api_name=False)
        slider.change(None, slider, tokens, js=f"(index) => {budgets}[index - 1]")
        gradio.on(
            [button.click, question.submit],
            ask,
            [image, question, tokens],
            [answer, costs],
            api_name="ask",
            concurrency_limit=1,
        )
    return page


def launch(repo: str, host: str | None = None, port: int | None = None, max_new_tokens: int = 256) -> None:
    """
    Serve the demo of `repo`, folder or Hub id, until the process ends. Gradio's analytics are off.

    The model runs on the accelerator in bfloat16 where there is one, else on the CPU in float32. `host` and `port` are
    127.0.0.1 and the first free port from 7860 by default, or `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = AutoModelForImageTextToText.from_pretrained(repo, dtype=dtype, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    page = build_app(model.to(device).eval(), processor, os.path.basename(repo.rstrip("/")), max_new_tokens)
    # A theme with the system's own fonts: Gradio's would be fetched from Google.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    look = {"theme": theme, "css": CSS, "max_file_size": "20mb"}
    try:  # quiet: without a hint at Gradio's servers, and without the address
        page.launch(server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, **look)
    except OSError as error:
        if port is None:
            raise
        raise OSError(f"port {port} is in use; choose another with --port") from error
    sys.stderr.write(f"{page.local_url}\n")
    page.block_thread()


if __name__ == "__main__":
    launch(os.environ["DELTA_LLAVA_MODEL"])
