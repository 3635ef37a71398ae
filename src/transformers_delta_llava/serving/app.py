"""A page for a model: picture, question, answer as it is generated, a slider for the visual tokens, a heat map."""

import os
from collections.abc import Iterator
from typing import Any

from ..analysis import draw_heat, load_repo
from ..modeling import DeltaLlavaForConditionalGeneration
from ..processing import DeltaLlavaProcessor
from ..utils.hub import public_name
from .conversation import Conversation
from .page_input import HEAT, NO_HEAT, caption, choose_budgets, location, read_upload, sentence


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
