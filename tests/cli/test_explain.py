"""`delta-llava explain`: answers on stdout, a picture whole or not at all, one sentence on what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.analysis import figures


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration(tiny_config())
    folder = tmp_path_factory.mktemp("repos") / "tiny"
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    picture = Image.new("RGB", (40, 24), "red")
    picture.paste("blue", (0, 0, 20, 12))
    picture.save("photo.png")
    return Path("photo.png")


def test_answers_are_printed_and_the_picture_is_written(call, repo, photo) -> None:
    code, out, err = call("explain", repo, photo, "[bold]what?", "--max-new-tokens", 3)
    assert code == 0 and "[bold]what?" in out and "explained" in out
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")] == ["36", "16", "9"]
    assert err.splitlines()[-1] == "wrote explain.png" and "wrote" not in out
    assert Image.open("explain.png").width == 2 * 28 + 4 * 336 + 3 * 20
    assert sorted(Path().iterdir()) == [Path("explain.png"), photo]


@pytest.mark.parametrize(("on", "side"), [("visual_tokens", 2), ("patches", 12)])
def test_json_holds_the_heat(call, repo, photo, on, side) -> None:
    options = ["--num-visual-tokens", "4", "--num-visual-tokens", "auto", "--on", on, "--max-new-tokens", 3]
    code, out, _ = call("explain", repo, photo, "what?", *options, "--token", 1, "--json", "--output", "a.JPG")
    report = json.loads(out)
    assert code == 0 and (report["model"], report["prompt"], report["on"]) == ("tiny", "what?", on)
    first, auto = report["runs"]
    assert first["num_visual_tokens"] == 4 and auto["num_visual_tokens"] in (144, 36, 16, 9, 4, 1)
    assert len(first["heat"]) == len(first["heat"][0]) == side
    assert first["token"] == first["answer"].split()[1]
    assert Image.open("a.JPG").format == "JPEG"
    by_text = call("explain", repo, photo, "what?", *options, "--token", first["token"], "--json")[1]
    assert json.loads(by_text)["runs"][0]["answer"] == first["answer"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: "nowhere/at/all"}, "nowhere/at/all is not a folder, and not a Hub id (owner/name) either."),
        ({1: "nowhere.jpg"}, "nowhere.jpg: there is no such image."),
        ({1: __file__}, f"{__file__} is not an image that can be read: "),
        ({2: "  "}, "The prompt is empty: ask something about the picture."),
        ({4: "--num-visual-tokens=5"}, "num_visual_tokens=5: this model cannot give it; use one of 144, 36, 16"),
        ({4: "--num-visual-tokens=many"}, "`num_visual_tokens` must be an integer or 'auto'"),
        ({4: "--token=2"}, "token=2: the answer with 36 visual tokens does not have it; its tokens are 0 "),
        (
            {4: "--token=giraffe"},
            "token='giraffe': the answer with 36 visual tokens does not have it; its tokens are 0 ",
        ),
        ({4: "--token="}, "token='': the answer with 36 visual tokens does not have it; its tokens are 0 "),
        ({4: "--on=pixels"}, "on='pixels': use 'visual_tokens' or 'patches'."),
        ({4: "--max-new-tokens=0"}, "max_new_tokens=0: use at least 1."),
        ({4: "--dtype=int8"}, "dtype='int8': use one of float32, bfloat16, float16."),
        ({4: "--device=abacus"}, "device='abacus' is not to be had here: "),
        ({4: "--output=heat.pdf"}, "heat.pdf: name a file that ends in .png or .jpg or .jpeg."),
        ({4: "--output=heat"}, "heat: name a file that ends in .png or .jpg or .jpeg."),
        ({4: "--output=no/such/heat.png"}, "no/such/heat.png: the folder no/such does not exist."),
        ({4: "--output=folder.png"}, "folder.png: this is a folder."),
    ],
)
def test_bad_input_is_one_sentence(call, repo, photo, changes, message) -> None:
    Path("folder.png").mkdir()
    arguments = ["explain", repo, photo, "what?", "--max-new-tokens=2", "--json"]
    for place, value in changes.items():
        arguments[1 + place if place < 3 else 5] = value
    code, out, err = call(*arguments) if 4 not in changes else call(*arguments, "--max-new-tokens=2", changes[4])
    (line,) = err.strip().splitlines()
    assert code == 2 and line.startswith(f"delta-llava: {message}") and line.endswith(".")
    assert not out and sorted(Path().iterdir()) == [Path("folder.png"), photo]


def test_what_cannot_be_written_leaves_the_old_picture(call, repo, photo, monkeypatch) -> None:
    old = Path("explain.png")
    old.write_bytes(b"old")

    def save(self, path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures.Image.Image, "save", save)
    code, out, err = call("explain", repo, photo, "what?", "--max-new-tokens", 1)
    assert code == 2 and not out and "No space left on device" in err
    assert old.read_bytes() == b"old" and sorted(Path().iterdir()) == [old, photo]


def test_a_file_that_may_not_be_written_is_refused_at_once(call, photo, monkeypatch) -> None:
    monkeypatch.setattr(figures.os, "access", lambda path, mode: False)  # root may write everything
    code, _, err = call("explain", "no/repo", photo, "what?", "--output", "heat.png")
    assert (code, err) == (2, "delta-llava: heat.png may not be written.\n")
