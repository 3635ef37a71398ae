"""Images that are drawn for the purpose: text, shapes to count, and charts."""

import io
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.smol.sources import SIDE, pale


COLORS = {
    "red": (214, 40, 40),
    "green": (46, 139, 60),
    "blue": (38, 84, 196),
    "yellow": (245, 200, 30),
    "orange": (245, 130, 20),
    "purple": (128, 50, 160),
    "black": (25, 25, 25),
    "pink": (245, 120, 180),
}
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("one", "two", "three", "four", "five", "six")
Turns = list[tuple[str, str]]


def draw_text(lines: list[str], fonts: list[Path], rng: random.Random) -> Image.Image:
    """(224, 224): lines of text, as large as fits or somewhat smaller, dark on pale or pale on dark."""
    dark, light = tuple(rng.randint(0, 90) for _ in range(3)), pale(rng)
    ink, ground = (dark, light) if rng.random() < 0.7 else (light, dark)
    image = Image.new("RGB", (SIDE, SIDE), ground)
    file = rng.choice(fonts)
    longest = max(lines, key=len)
    share = rng.uniform(0.75, 0.95)
    size = 130
    while size > 12:
        font = ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)
        if font.getlength(longest) <= share * SIDE and size * len(lines) < 0.8 * SIDE:
            break
        size -= 4
    height = int(size * 1.25)
    widest = int(font.getlength(longest))
    x = rng.randint(0, max(SIDE - widest, 0))
    y = rng.randint(0, max(SIDE - height * len(lines), 0))
    pen = ImageDraw.Draw(image)
    for index, line in enumerate(lines):
        pen.text((x, y + index * height), line, fill=ink, font=font)
    return image


def make_text(words: list[str], fonts: list[Path], held_out: int, rng: random.Random) -> tuple[Image.Image, Turns]:
    """
    An image of writing, and what it says.

    Args:
        words: to choose from; those of training and of the test differ.
        fonts: likewise.
        held_out: 1 for numbers of the test, 0 for those of training: every fifth number is the test's.
        rng: of everything.
    """
    kind = rng.choices(("word", "number", "time", "price", "lines"), (5, 3, 1, 1, 1))[0]
    if kind == "number":
        text = str(_number(10 ** rng.randint(1, 4), held_out, rng))
        return draw_text([text], fonts, rng), [("What number is this?", text)]
    if kind == "time":
        minutes = _number(24 * 60, held_out, rng)
        text = f"{minutes // 60}:{minutes % 60:02}"
        return draw_text([text], fonts, rng), [("What time is it?", text)]
    if kind == "price":
        cents = _number(10_000, held_out, rng)
        text = f"${cents // 100}.{cents % 100:02}"
        return draw_text([text], fonts, rng), [("How much is it?", text)]
    if kind == "lines":
        both = [rng.choice([word for word in words if len(word) < 6]) for _ in range(2)]
        image = draw_text([style(word, rng) for word in both], fonts, rng)
        return image, [("Spell both words.", ", ".join(" ".join(word) for word in both))]
    word = rng.choice(words)
    return draw_text([style(word, rng)], fonts, rng), [("Spell the word.", " ".join(word))]


def style(word: str, rng: random.Random) -> str:
    """A word as signs write it."""
    return rng.choice((word, word.upper(), word.capitalize()))


def _number(limit: int, held_out: int, rng: random.Random) -> int:
    while True:
        number = rng.randrange(limit)
        if (number % 5 == 3) == bool(held_out):
            return number


def make_scene(rng: random.Random) -> tuple[Image.Image, Turns]:
    """One or two groups of shapes, and their number and color."""
    groups = list(zip(rng.sample(SHAPES, 2), rng.sample(sorted(COLORS), 2)))[: rng.randint(1, 2)]
    counts = [rng.randint(1, 6 if len(groups) == 1 else 4) for _ in groups]
    scale = 3
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), pale(rng))
    pen = ImageDraw.Draw(image)
    cells = iter(rng.sample(range(9), sum(counts)))
    step = SIDE * scale // 3
    for (shape, color), count in zip(groups, counts):
        for cell in (next(cells) for _ in range(count)):
            radius = rng.randint(step // 4, step * 2 // 5)
            x = cell % 3 * step + step // 2 + rng.randint(-step // 12, step // 12)
            y = cell // 3 * step + step // 2 + rng.randint(-step // 12, step // 12)
            _draw_shape(pen, shape, (x, y), radius, COLORS[color])
    turns = []
    for (shape, color), count in zip(groups, counts):
        turns.append((f"How many {shape}s are there?", NUMBERS[count - 1]))
        turns.append((f"What color {'is the ' + shape if count == 1 else 'are the ' + shape + 's'}?", color))
    rng.shuffle(turns)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), turns


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, at: tuple[int, int], radius: int, color: tuple) -> None:
    x, y = at
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "triangle":
        pen.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=color)
    else:
        outer = ((0, -10), (2.4, -3.2), (9.5, -3.1), (3.8, 1.2), (5.9, 8.1), (0, 4), (-5.9, 8.1))
        points = (*outer, (-3.8, 1.2), (-9.5, -3.1), (-2.4, -3.2))
        pen.polygon([(x + radius * a / 10, y + radius * b / 10) for a, b in points], fill=color)


def make_chart(rng: random.Random) -> tuple[Image.Image, Turns]:
    """A chart of bars or slices in colors, the extremes of which differ clearly from the rest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = rng.randint(2, 5)
    colors = rng.sample(sorted(COLORS), count)
    values = rng.sample(range(2, 11), count)
    kind = rng.choice(("bar", "barh", "pie"))
    figure = Figure(figsize=(2.24, 2.24), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    fills: list = [tuple(part / 255 for part in COLORS[color]) for color in colors]
    if kind == "pie":
        axes.pie(values, colors=fills)
        names = ("slice", "largest", "smallest")
    else:
        (axes.bar if kind == "bar" else axes.barh)(range(count), values, color=fills)
        names = ("bar", *(("tallest", "shortest") if kind == "bar" else ("longest", "shortest")))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    turns = [
        (f"What color is the {names[1]} {names[0]}?", colors[values.index(max(values))]),
        (f"What color is the {names[2]} {names[0]}?", colors[values.index(min(values))]),
        (f"How many {names[0]}s are there?", NUMBERS[count - 1]),
    ]
    rng.shuffle(turns)
    return image, turns
