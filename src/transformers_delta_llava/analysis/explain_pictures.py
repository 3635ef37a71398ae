"""Heat over the picture it belongs to, for one budget or for several side by side."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..processing import DeltaLlavaProcessor
from ..processing.pictures_delta_llava import to_rgb
from .drawing import FAINT_INK, INK, PAPER, font, tower_view, wrap
from .explain import Explanation


SUFFIXES = (".png", ".jpg", ".jpeg")
# Colours of the heat from 0 to 1, from dark to bright and through hues that the colour-blind can tell apart.
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float)
# Share of the picture that shows through where there is no heat, and where there is most.
THROUGH = (0.6, 0.2)
PANEL, GAP, MARGIN, PANELS_PER_ROW = 336, 20, 28, 5
NOTES = {
    "visual_tokens": "Heat at the visual tokens, one cell each",
    "patches": "Heat at the patches that the vision tower sees",
}


def draw_heat(picture: Image.Image, explanation: Explanation, processor: DeltaLlavaProcessor) -> Image.Image:
    """
    The picture as the vision tower sees it, padded or cut to a square, with the heat of `explanation` over it.

    The heat is interpolated between the middles of its cells. A small square is enlarged to 336 pixels.

    Raises:
        ValueError: the picture cannot be used.
    """
    view = tower_view(picture, processor)
    if view.width < PANEL:
        view = view.resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    cells = Image.fromarray(explanation.heat.numpy())
    heat = np.asarray(cells.resize(view.size, Image.Resampling.BILINEAR)).clip(0, 1)[..., None]
    steps = np.linspace(0, 1, len(HEAT))
    colours = np.concatenate([np.interp(heat, steps, channel) for channel in HEAT.T], axis=-1)
    through = THROUGH[0] + (THROUGH[1] - THROUGH[0]) * heat
    mixed = np.asarray(view, float) * through + colours * (1 - through)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def draw_explanations(
    picture: Image.Image,
    explanations: Sequence[Explanation],
    processor: DeltaLlavaProcessor,
    prompt: str,
    on: str = "visual_tokens",
) -> Image.Image:
    """
    The picture, then the heat of every explanation with its answer, side by side under the prompt.

    Raises:
        ValueError: the picture cannot be used.
    """
    scrap = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    body, small, large = font(17), font(13), font(22)
    panels = [(_fit(to_rgb(picture, 0)), "the picture", "", "")]
    for found in explanations:
        count = f"{found.num_visual_tokens} visual token{'s' * (found.num_visual_tokens != 1)}"
        none = "" if found.heat.any() else ": nothing speaks for it"
        heat = _fit(draw_heat(picture, found, processor))
        panels.append((heat, count, found.answer or "(nothing)", f"heat of “{found.token}”{none}"))
    columns = min(len(panels), PANELS_PER_ROW)
    width = 2 * MARGIN + columns * PANEL + (columns - 1) * GAP
    head = wrap(scrap, prompt, large, width - 2 * MARGIN)
    notes = wrap(scrap, f"{NOTES[on]}. Every panel has its own scale, from none to most.", small, width - 2 * MARGIN)
    texts = [
        [wrap(scrap, text, letters, PANEL) for text, letters in ((panel[2], body), (panel[3], small))]
        for panel in panels
    ]
    heights = [PANEL + 40 + 24 * len(answer) + 20 * len(token) + GAP for answer, token in texts]
    rows = [max(heights[start : start + columns]) for start in range(0, len(panels), columns)]
    page = Image.new("RGB", (width, 2 * MARGIN + 32 * len(head) + 12 + sum(rows) + 20 * len(notes)), PAPER)
    draw = ImageDraw.Draw(page)
    for index, line in enumerate(head):
        draw.text((MARGIN, MARGIN + 32 * index), line, INK, large)
    for index, ((shown, title, *_), (answer, token)) in enumerate(zip(panels, texts)):
        left = MARGIN + index % columns * (PANEL + GAP)
        top = MARGIN + 32 * len(head) + 12 + sum(rows[: index // columns])
        page.paste(shown, (left, top + (PANEL - shown.height) // 2))
        draw.text((left, top + PANEL + 8), title, FAINT_INK, small)
        for line_number, line in enumerate(answer):
            draw.text((left, top + PANEL + 30 + 24 * line_number), line, INK, body)
        for line_number, line in enumerate(token):
            draw.text((left, top + PANEL + 34 + 24 * len(answer) + 20 * line_number), line, FAINT_INK, small)
    for index, line in enumerate(notes):
        draw.text((MARGIN, page.height - MARGIN - 20 * (len(notes) - index)), line, FAINT_INK, small)
    return page


def _fit(picture: Image.Image) -> Image.Image:
    """As large as a panel holds."""
    scale = PANEL / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    # The gap spares a very long image weights for each of its pixels; to others it makes no difference that one sees.
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=4.0)
