"""A Gradio demo app of a model, locally or as a Space."""

import html
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..analysis import Explanation, load_image, load_repo, overlay_saliency
from ..analysis.figures import import_matplotlib
from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.errors import DeltaLlavaError
from ..utils.files import atomic_folder, check_output, check_repo_id, public_name, write_json
from .conversation import Conversation


# Choices of the saliency map, and what `explain` calls them. docs/explain.md tells why patches come first.
SALIENCY = {"patches": "patches", "visual tokens": "visual_tokens"}
NO_SALIENCY = "none"
ABOUT = (
    "Ask about an image. The model sees it as a number of visual tokens: the fewer, the faster, and the less it sees. The same "
    "weights serve every number."
)
# The slider's own numbers are indices of budgets, from 1; the box beside it shows the tokens.
CSS = "#budget .tab-like-container, #budget .min_value, #budget .max_value { display: none; }"


def build_app(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    name: str = "Delta-LLaVA",
    num_visual_tokens: int | None = None,
    max_new_tokens: int = 256,
) -> Any:
    """
    A `gradio.Blocks` that answers questions about images.

    Questions are answered one after the other, so visitors wait for each other. The app shows what is wrong with a
    question, and stays up. Uploaded images, of up to 20 MB, are deleted within two hours.

    Args:
        model: on any device, in evaluation mode.
        processor: its own.
        name: shown on top.
        num_visual_tokens: that the slider starts at; by default the model's.
        max_new_tokens: length of the longest answer.

    Raises:
        ValueError: Gradio or matplotlib is not installed, or a budget that the model does not have.
    """
    gradio = import_gradio()
    import_matplotlib()
    budgets, first = choose_budgets(processor, num_visual_tokens)
    conversation = Conversation(model, processor, max_new_tokens)

    def ask(
        file: str | None, question: str, num_visual_tokens: int | None, saliency: str, word: str
    ) -> Iterator[tuple[str, str, Any, str]]:
        """Answer and costs, several times while the answer grows, then these with the saliency map and its caption."""
        try:
            shown = read_upload(file)
            for answer in conversation.ask(shown, question or "", num_visual_tokens):
                yield answer.text, str(answer), None, ""
        except Exception as error:
            raise gradio.Error(describe_error(error), print_exception=False) from error
        if saliency == NO_SALIENCY:
            return
        try:
            explanation = conversation.explain(shown, question, num_visual_tokens, word or "", SALIENCY[saliency])
            overlay = overlay_saliency(shown, explanation, processor)
            yield answer.text, str(answer), overlay, caption(explanation)
        except Exception as error:  # the answer stands all the same
            gradio.Warning(f"There is no saliency map. {describe_error(error)}")

    with gradio.Blocks(title=name, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {name}\n{ABOUT}")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=320,
                    buttons=["fullscreen"],
                    label="Image",
                    elem_id="image",
                )
                # Gradio would open the file itself, and has no message for one that is not an image.
                image.preprocess = upload_location
                question = gradio.Textbox(label="Question", placeholder="What is in this image?", elem_id="question")
                with gradio.Row():
                    slider = gradio.Slider(
                        1,
                        max(2, len(budgets)),
                        1 + budgets.index(first),
                        step=1,
                        label="Fewer or more visual tokens",
                        scale=3,
                        interactive=len(budgets) > 1,
                        elem_id="budget",
                    )
                    tokens = gradio.Number(
                        first,
                        precision=0,
                        label="Visual tokens",
                        scale=1,
                        min_width=110,
                        interactive=False,
                        elem_id="tokens",
                    )
                with gradio.Row():
                    choices = [*SALIENCY, NO_SALIENCY]
                    saliency = gradio.Radio(choices, value="patches", label="Saliency map", scale=2)
                    word = gradio.Textbox(label="Word of the answer", placeholder="its first", min_width=110)
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
            with gradio.Column():
                answer = gradio.Textbox(label="Answer", interactive=False, lines=3, elem_id="answer")
                costs = gradio.Markdown(elem_id="costs")
                saliency_map = gradio.Image(
                    label="Saliency map",
                    interactive=False,
                    format="png",
                    height=400,
                    buttons=["download", "fullscreen"],
                    elem_id="map",
                )
                map_caption = gradio.Markdown(elem_id="caption")
        slider.change(None, slider, tokens, js=f"(index) => {budgets}[index - 1]")
        gradio.on(
            [button.click, question.submit],
            ask,
            [image, question, tokens, saliency, word],
            [answer, costs, saliency_map, map_caption],
            api_name="ask",
            concurrency_limit=1,
        )
    return page


def choose_budgets(processor: DeltaLlavaProcessor, num_visual_tokens: int | None) -> tuple[list[int], int]:
    """
    The budgets from few to many, and the one to start with.

    Raises:
        ValueError: a budget that the model does not have.
    """
    budgets = sorted(processor.visual_token_budgets)
    if num_visual_tokens is None:  # the default of a repo may also be "auto", or one of each for several images
        defaults = processor.num_visual_tokens, processor.image_seq_length, budgets[-1]
        return budgets, next(budget for budget in defaults if budget in budgets)
    processor.resolve_num_visual_tokens(num_visual_tokens)
    return budgets, num_visual_tokens


def upload_location(payload: Any) -> str | None:
    """Of an upload as Gradio describes it, the file on this machine, or the whole of it as a data URI."""
    if payload is None:
        return None
    inline = payload.url is not None and payload.url.startswith("data:")
    return str(payload.url if inline else payload.path)


def read_upload(location: str | None) -> Image.Image:
    """
    The image that a visitor sent.

    Raises:
        ValueError: there is none, or it is not an image. The message does not tell the visitor where the file lies.
    """
    if not location:
        raise ValueError("There is no image: upload one first.")
    try:
        return load_image(location)
    except ValueError as error:
        raise ValueError("This file cannot be read as an image.") from error


def caption(explanation: Explanation) -> str:
    """What a saliency map shows."""
    if not explanation.saliency.any():
        return f"No part of the image raises the score of “{explanation.token}”"
    cells = explanation.saliency.shape[0]
    return f"Saliency of “{explanation.token}”, in {cells} x {cells} cells"


def describe_error(error: Exception) -> str:
    """The error as the app shows it. One that is not the visitor's goes to the log in full."""
    if not isinstance(error, ValueError):
        logging.getLogger(__name__).error("a question could not be answered", exc_info=error)
    text = " ".join(str(error).split())[:500] or type(error).__name__
    return html.escape(text, quote=False)  # the page takes it for HTML, and it may quote the visitor


def launch_app(
    repo: str,
    host: str | None = None,
    port: int | None = None,
    num_visual_tokens: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    max_new_tokens: int = 256,
) -> None:
    """
    Serve the demo app of `repo` until the process is ended. It sends nothing to anybody, and needs no internet.

    The model's code is this package's, not the repo's.

    Args:
        repo: folder or Hub id of a Delta-LLaVA.
        host: address to listen on; by default GRADIO_SERVER_NAME, or 127.0.0.1.
        port: port to listen on; by default GRADIO_SERVER_PORT, or the first free one from 7860.
        num_visual_tokens: that the slider starts at; by default the repo's.
        device: a device of torch; `auto` is a GPU with bfloat16 where there is one, else the CPU with float32.
        dtype: float32, bfloat16 or float16.
        max_new_tokens: length of the longest answer.

    Raises:
        ValueError: Gradio or matplotlib is not installed, the repo cannot be used, or it does not have this budget.
        OSError: the port is taken.
    """
    gradio = import_gradio()
    if device == "auto":
        device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    model, processor = load_repo(repo, device, dtype)
    page = build_app(model, processor, public_name(repo), num_visual_tokens, max_new_tokens)
    # A theme with the system's own fonts: Gradio's would be fetched from Google.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        theme=theme,
        css=CSS,
        max_file_size="20mb",
        footer_links=["api"],
    )


def import_gradio() -> Any:
    """
    The module, with its analytics off.

    Raises:
        ValueError: it is not installed.
    """
    # Read at import or later: no analytics, and no history of questions.
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        os.environ.setdefault(name, "False")
    try:
        import gradio
    except ImportError as error:
        raise ValueError("The app needs Gradio: pip install 'transformers-delta-llava[app]'.") from error
    return gradio


# The versions that tests/integration/environments/app.txt has.
GRADIO, PYTHON = "6.31.0", "3.11"
# A folder that holds this file was written here, so it may be replaced.
MARKER = "space.json"
DISTRIBUTION = "transformers-delta-llava"
README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
models:
- {model}
license: apache-2.0
---

Demo app of [{model}](https://huggingface.co/{model}): upload an image, ask, and choose how many visual tokens the model gets.
Written by `delta-llava space` of {distribution} {version}.
"""
APP = '''"""Demo app of {model}, written by `delta-llava space`."""

import os

from transformers_delta_llava.serving import launch_app


launch_app(os.environ.get("DELTA_LLAVA_MODEL", "{model}"), num_visual_tokens={num_visual_tokens}, device="auto")
'''


def write_space(
    folder: Path,
    model: str,
    package_url: str | None = None,
    title: str | None = None,
    num_visual_tokens: int | None = None,
    overwrite: bool = False,
) -> None:
    """
    Write the folder of a Gradio Space: README.md with its settings, app.py, and requirements.txt.

    The model is not loaded: it need not be published yet.

    Args:
        folder: appears complete or not at all.
        model: Hub id. The Space's variable `DELTA_LLAVA_MODEL`, a Hub id or a path there, takes precedence.
        package_url: git URL (`https://...`, with `@REVISION` if need be) that the Space installs this package from; by
            default the one that it was installed from here, at the same commit.
        title: of the Space; by default the model's name.
        num_visual_tokens: that the slider starts at; by default the model's.
        overwrite: replace a folder that this function wrote.

    Raises:
        ValueError: no Hub id, a folder that exists, or a URL that is missing or not of `https`.
    """
    check_repo_id(model)
    url = package_url or installed_from()
    if url is None:
        raise DeltaLlavaError(
            "This package was not installed from a git URL that the Space could install it from: name one with `package_url=...`."
        )
    if not re.fullmatch(r"https://[^\s;#'\"]+", url):
        raise DeltaLlavaError(
            f"package_url={url!r} is not a git URL of the form https://HOST/PATH or https://HOST/PATH@REVISION."
        )
    check_output(folder, [], overwrite, MARKER)
    facts = {
        "model": model,
        "distribution": DISTRIBUTION,
        "version": importlib.metadata.version(DISTRIBUTION),
        "gradio": GRADIO,
        "python": PYTHON,
        "num_visual_tokens": num_visual_tokens,
        "title": json.dumps(title or model.partition("/")[2], ensure_ascii=False),  # JSON strings are YAML, too
    }
    with atomic_folder(folder, overwrite, MARKER) as tmp_dir:
        (tmp_dir / "README.md").write_text(README.format(**facts), encoding="utf-8")
        (tmp_dir / "app.py").write_text(APP.format(**facts), encoding="utf-8")
        (tmp_dir / "requirements.txt").write_text(f"{DISTRIBUTION}[app] @ git+{url}\n", encoding="utf-8")
        write_json({name: facts[name] for name in ("model", "version", "gradio")}, tmp_dir / MARKER)


def installed_from() -> str | None:
    """The git URL, with the commit, that pip installed this package from; None for any other source."""
    origin = json.loads(importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    vcs = origin.get("vcs_info", {})
    return f"{origin['url']}@{vcs['commit_id']}" if vcs.get("vcs") == "git" else None
