"""A Gradio demo of a model, locally or as a Space."""

import html
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from ..analysis import Explanation, draw_heat, load_picture, load_repo
from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.errors import DeltaLlavaError
from ..utils.files import atomic_folder, check_output, is_repo_id, public_name, write_json
from .conversation import Conversation


# Where a visitor may have the heat drawn, in words of the page and of `explain`. docs/explain.md tells why patches come first.
HEAT = {"patches": "patches", "visual tokens": "visual_tokens"}
NO_HEAT = "none"


def choose_budgets(processor: DeltaLlavaProcessor, num_visual_tokens: int | None) -> tuple[list[int], int]:
    """
    The budgets from few to many, and the one to begin with.

    Raises:
        ValueError: a budget that the model does not have.
    """
    budgets = sorted(processor.visual_token_budgets)
    if num_visual_tokens is None:  # the default of a repo may also be "auto", or one of each for several images
        usual = processor.num_visual_tokens, processor.image_seq_length, budgets[-1]
        return budgets, next(budget for budget in usual if budget in budgets)
    if num_visual_tokens not in budgets:
        choices = ", ".join(map(str, budgets))
        raise ValueError(f"num_visual_tokens={num_visual_tokens}: this model cannot give it; use one of {choices}.")
    return budgets, num_visual_tokens


def read_upload(place: str | None) -> Image.Image:
    """
    The picture that a visitor sent.

    Raises:
        ValueError: there is none, or it is no picture. The visitor is not told where the file lies.
    """
    if not place:
        raise ValueError("There is no picture: upload one first.")
    try:
        return load_picture(place)
    except ValueError as error:
        raise ValueError("This file is not a picture that can be read.") from error


def caption(explanation: Explanation) -> str:
    """What a heat map shows."""
    if not explanation.heat.any():
        return f"Nothing in the picture speaks for “{explanation.token}”"
    cells = explanation.heat.shape[0]
    return f"Where “{explanation.token}” comes from, in {cells} x {cells} places"


def sentence(error: Exception) -> str:
    """What the page says of an error. One that is not the visitor's goes to the log in full."""
    if not isinstance(error, ValueError):
        logging.getLogger(__name__).error("a question could not be answered", exc_info=error)
    words = " ".join(str(error).split())[:500] or type(error).__name__
    return html.escape(words, quote=False)  # the page takes it for HTML, and it may quote the visitor


def location(payload: Any) -> str | None:
    """Of an upload as Gradio describes it, the file on this machine, or the whole of it as a data URI."""
    if payload is None:
        return None
    inline = payload.url is not None and payload.url.startswith("data:")
    return str(payload.url if inline else payload.path)


ABOUT = (
    "Ask about a picture. The model sees it as a number of visual tokens: the fewer, the faster, and the less it sees. The same "
    "weights serve every number."
)
# The slider's own numbers are those of its places, from 1 up; the box beside it shows the tokens.
CSS = """
#budget .tab-like-container, #budget .min_value, #budget .max_value { display: none; }
"""


def build_app(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    name: str = "Delta-LLaVA",
    num_visual_tokens: int | None = None,
    max_new_tokens: int = 256,
) -> Any:
    """
    A `gradio.Blocks` that answers questions about pictures.

    Questions are answered one after the other, so visitors wait for each other. What is wrong with a question is said on
    the page, and the page lives on. Uploaded pictures, of up to 20 MB, are deleted within two hours.

    Args:
        model: on any device, in evaluation mode.
        processor: its own.
        name: shown on top.
        num_visual_tokens: where the slider stands at first; by default the model's.
        max_new_tokens: length of the longest answer.

    Raises:
        ValueError: Gradio is not installed, or a budget that the model does not have.
    """
    gradio = import_gradio()
    budgets, first = choose_budgets(processor, num_visual_tokens)
    conversation = Conversation(model, processor, max_new_tokens)

    def ask(
        picture: str | None, question: str, num_visual_tokens: int | None, heat: str, word: str
    ) -> Iterator[tuple[str, str, Any, str]]:
        """Answer and what it took, several times while they grow, then these with the heat map and what it shows."""
        try:
            shown = read_upload(picture)
            for said in conversation.ask(shown, question or "", num_visual_tokens):
                yield said.text, str(said), None, ""
        except Exception as error:
            raise gradio.Error(sentence(error), print_exception=False) from error
        if heat == NO_HEAT:
            return
        try:
            explanation = conversation.explain(shown, question, num_visual_tokens, word or "", HEAT[heat])
            drawn = draw_heat(shown, explanation, processor)
            yield said.text, str(said), drawn, caption(explanation)
        except Exception as error:  # the answer stands all the same
            gradio.Warning(f"There is no heat map. {sentence(error)}")

    with gradio.Blocks(title=name, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {name}\n{ABOUT}")
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=320,
                    buttons=["fullscreen"],
                    label="Picture",
                    elem_id="picture",
                )
                # Gradio would open the file itself, and has no words for one that is no picture.
                picture.preprocess = location
                question = gradio.Textbox(label="Question", placeholder="What is in this picture?", elem_id="question")
                with gradio.Row():
                    place = gradio.Slider(
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
                    heat = gradio.Radio([*HEAT, NO_HEAT], value="patches", label="Heat map", scale=2, elem_id="heat")
                    word = gradio.Textbox(
                        label="Word of the answer", placeholder="its first", min_width=110, elem_id="word"
                    )
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
            with gradio.Column():
                answer = gradio.Textbox(label="Answer", interactive=False, lines=3, elem_id="answer")
                spent = gradio.Markdown(elem_id="spent")
                heat_map = gradio.Image(
                    label="Heat map",
                    interactive=False,
                    format="png",
                    height=400,
                    buttons=["download", "fullscreen"],
                    elem_id="map",
                )
                source = gradio.Markdown(elem_id="source")
        place.change(None, place, tokens, js=f"(place) => {budgets}[place - 1]")
        gradio.on(
            [button.click, question.submit],
            ask,
            [picture, question, tokens, heat, word],
            [answer, spent, heat_map, source],
            api_name="ask",
            concurrency_limit=1,
        )
    return page


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
    Show the page of `repo` until the process is ended. It sends nothing to anybody, and needs no internet.

    The model's code is this package's, not the repo's.

    Args:
        repo: folder or Hub id of a Delta-LLaVA.
        host: address to listen on; by default what GRADIO_SERVER_NAME says, or 127.0.0.1.
        port: port to listen on; by default what GRADIO_SERVER_PORT says, or the first free one from 7860.
        num_visual_tokens: where the slider stands at first; by default the repo's.
        device: a device of torch.
        dtype: float32, bfloat16 or float16.
        max_new_tokens: length of the longest answer.

    Raises:
        ValueError: Gradio is not installed, the repo cannot be used, or it does not have this budget.
        OSError: the port is taken.
    """
    gradio = import_gradio()
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
    The module, told to send nothing home.

    Raises:
        ValueError: it is not installed.
    """
    # Read at import or later: no analytics, and no history of what was asked.
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        os.environ.setdefault(name, "False")
    try:
        import gradio
    except ImportError as error:
        raise ValueError("The page needs Gradio: pip install 'transformers-delta-llava[app]'.") from error
    return gradio


# The versions that tests/integration/environments/app.txt has.
GRADIO, PYTHON = "6.31.0", "3.11"
# A folder that holds this file was written here, so it may be replaced.
MARKER = "space.json"
PACKAGE, DISTRIBUTION = "transformers_delta_llava", "transformers-delta-llava"
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

The page of [{model}](https://huggingface.co/{model}): upload a picture, ask, and choose how many visual tokens the model gets.

Written by `delta-llava space`. `{package}/` is the code of {distribution} {version}, as it was installed there; the model's weights
are read from the Hub when the Space starts.
"""
APP = '''"""The page of {model}. Written by `delta-llava space`."""

import os

import torch

from {package}.serving import launch_app


on_gpu = torch.cuda.is_available()
launch_app(
    os.environ.get("DELTA_LLAVA_MODEL", "{model}"),
    num_visual_tokens={num_visual_tokens},
    device="cuda" if on_gpu else "cpu",
    dtype="bfloat16" if on_gpu else "float32",
)
'''


def write_space(
    folder: Path,
    model: str,
    title: str | None = None,
    num_visual_tokens: int | None = None,
    overwrite: bool = False,
) -> None:
    """
    Write the folder of a Gradio Space: README.md with its settings, app.py, requirements.txt, and this package's code.

    The package itself goes in because a Space can only install what a registry or a public repository has. The model is not
    looked at: it need not be published yet.

    Args:
        folder: appears complete or not at all.
        model: Hub id. The Space's variable `DELTA_LLAVA_MODEL`, a Hub id or a path there, takes precedence.
        title: of the Space; by default the model's name.
        num_visual_tokens: where the slider stands at first; by default the model's.
        overwrite: replace a folder that this function wrote.

    Raises:
        ValueError: no Hub id, a folder that exists, or the package's metadata are not to be had.
    """
    if not is_repo_id(model):
        raise DeltaLlavaError(f"{model} is not a Hub id of the form owner/name.")
    package = Path(str(files(PACKAGE)))
    check_output(folder, [package], overwrite, MARKER)
    about = {
        "model": model,
        "package": PACKAGE,
        "distribution": DISTRIBUTION,
        "version": importlib.metadata.version(DISTRIBUTION),
        "gradio": GRADIO,
        "python": PYTHON,
        "num_visual_tokens": num_visual_tokens,
        "title": json.dumps(title or model.partition("/")[2], ensure_ascii=False),  # JSON strings are YAML, too
    }
    with atomic_folder(folder, overwrite, MARKER) as growing:
        (growing / "README.md").write_text(README.format(**about), encoding="utf-8")
        (growing / "app.py").write_text(APP.format(**about), encoding="utf-8")
        (growing / "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements()), encoding="utf-8")
        (growing / "LICENSE").write_text(_licence(package), encoding="utf-8")
        shutil.copytree(package, growing / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        write_json({name: about[name] for name in ("model", "version", "gradio")}, growing / MARKER)


def _requirements() -> list[str]:
    """What the package needs, without its extras; Gradio is the Space's SDK."""
    lines = importlib.metadata.requires(DISTRIBUTION) or []
    return sorted(line for line in lines if "extra ==" not in line)


def _licence(package: Path) -> str:
    """The text of the package's licence, which goes wherever its code goes."""
    installed = importlib.metadata.distribution(DISTRIBUTION).read_text("licenses/LICENSE")
    return installed or (package.parents[1] / "LICENSE").read_text(
        encoding="utf-8"
    )  # an editable install of a checkout
