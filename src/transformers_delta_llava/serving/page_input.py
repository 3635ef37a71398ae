"""What a visitor of the page may choose and send, and what is said of it. Free of Gradio."""

import html
import logging
from typing import Any

from PIL import Image

from ..analysis import Explanation, load_picture
from ..processing import DeltaLlavaProcessor


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
        raise ValueError(f"num_visual_tokens={num_visual_tokens} is not a budget of this model; it has {choices}.")
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
