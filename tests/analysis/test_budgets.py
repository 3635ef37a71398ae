"""The same question at every budget: right answers beside right budgets, and times that hold what they say."""

import json
import os
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.analysis import (
    BudgetComparison,
    BudgetRun,
    budgets,
    compare_budgets,
    explain,
    figures,
    load_config,
    load_picture,
    load_repo,
    write_comparison,
)
from transformers_delta_llava.cli.main import main
from transformers_delta_llava.processing import image_utils_delta_llava
from transformers_delta_llava.utils.errors import DeltaLlavaError


@pytest.fixture(scope="module")
def model() -> DeltaLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(tiny_config()).eval()


@pytest.fixture(scope="module")
def processor(model: Any) -> Any:
    return tiny_processor(model.config)


@pytest.fixture(scope="module")
def repo(model: Any, processor: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("repos") / "tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Two tiles by two, so that auto picks 4."""
    tiles = np.array([[0, 200], [200, 0]], np.uint8)
    return Image.fromarray(np.kron(tiles, np.ones((12, 12), np.uint8))).convert("RGB")


@pytest.fixture(scope="module")
def photo_path(photo: Image.Image, tmp_path_factory: Any) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    photo.save(path)
    return str(path)


def comparison(answer: str = "a cat", prompt: str = "what?", **changes: Any) -> BudgetComparison:
    run = {"prompt_tokens": 50, "answer": answer, "answer_tokens": 2, "tower_ms": 1.0, "first_token_ms": 3.0}
    run |= {"total_ms": 4.0, **changes}
    runs = [BudgetRun(visual_tokens=n, loss=1 / n, picked=n == 36, **run) for n in (144, 36, 1)]
    return BudgetComparison(prompt, runs, 0.3, 3, 64, "cpu", "float32", 1, {"torch": "2", "transformers": "5"})


# The runs.


def test_every_budget_is_asked_and_answers_as_generate_does(model: Any, processor: Any, photo: Any) -> None:
    calls: list[None] = []
    found = compare_budgets(
        model, processor, photo, "what?", max_new_tokens=5, repeats=2, on_run=lambda: calls.append(None)
    )
    assert [run.visual_tokens for run in found.runs] == [144, 36, 16, 9, 4, 1]
    assert [run.visual_tokens for run in found.runs if run.picked] == [4]
    assert len(calls) == 3 * 6
    assert {run.visual_tokens: run.loss for run in found.runs} == processor.image_losses(photo)[0]
    for run in found.runs:
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
            add_generation_prompt=True,
        )
        inputs = processor(text=text, images=photo, num_visual_tokens=run.visual_tokens, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert run.answer == processor.decode(ids, skip_special_tokens=True).strip()
        assert (run.prompt_tokens, run.answer_tokens) == (inputs["input_ids"].shape[1], 5)
        assert 0 < run.tower_ms < run.first_token_ms < run.total_ms
    assert (found.dtype, found.device, found.threads) == ("float32", "cpu", torch.get_num_threads())
    assert not model.model.multi_modal_projector._forward_pre_hooks


def test_budgets_can_be_chosen_and_auto_is_one_of_them(model: Any, processor: Any, photo: Any) -> None:
    options = {"max_new_tokens": 1, "repeats": 1}
    found = compare_budgets(model, processor, photo, "what?", [16, "auto", 16], **options)
    assert [(run.visual_tokens, run.picked) for run in found.runs] == [(16, False), (4, True)]
    assert all(run.first_token_ms == run.total_ms for run in found.runs)
    found = compare_budgets(model, processor, photo, "what?", ["auto", 4], auto_max_loss=1, **options)
    assert [(run.visual_tokens, run.picked) for run in found.runs] == [(4, False), (1, True)]
    assert found.auto_max_loss == 1


def test_times_are_medians_without_the_warm_up(model: Any, processor: Any, photo: Any, monkeypatch: Any) -> None:
    lengths = []

    def run(_: Any, __: Any, max_new_tokens: int) -> Any:
        watch = budgets._Watch(torch.device("cpu"))
        lengths.append(max_new_tokens)
        second = [1000, 3, 5, 4][len(lengths) - 1]
        watch.start, watch.tower_end, watch.marks, watch.tokens = 1.0, 1.0 + second / 2, [1.0 + second, 101.0], [5, 6]
        return watch

    monkeypatch.setattr(budgets, "_run", run)
    (row,) = compare_budgets(model, processor, photo, "what?", [4], max_new_tokens=9).runs
    assert (row.tower_ms, row.first_token_ms, row.total_ms) == (2000, 4000, 100_000)
    assert lengths == [2, 9, 9, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [5]}, "num_visual_tokens=5: this model cannot give it"),
        ({"budgets": ["many"]}, "not 'many'"),
        ({"auto_max_loss": 2}, "`auto_max_loss` must be"),
        ({"repeats": 0}, "repeats=0: use at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: use at least 1"),
    ],
)
def test_bad_arguments_are_refused(model: Any, processor: Any, photo: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_budgets(model, processor, photo, "what?", **options)


# The page and the picture.


class Reader(HTMLParser):
    """Tags and visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.images += [value for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


EVIL = "<script>alert('1')</script><b>&amp;\"{{ 7 * 7 }}"


def test_the_page_shows_all_and_escapes_it(processor: Any, photo: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_comparison(comparison(EVIL, EVIL), photo, processor, EVIL, path)
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not {"script", "b"} & set(reader.tags)
    text = "\n".join(reader.text)
    assert text.count(EVIL) == 6  # title, heading, name of the model, three answers
    assert text.count("picked by auto") == 1 and "first token 3.0 ms" in text and "loss 0.03" in text
    assert "Medians of 3 runs" in text
    assert len(reader.images) == 4 and all(image.startswith("data:image/png;base64,") for image in reader.images)


@pytest.mark.parametrize(
    "answer", ["yes", "", "word " * 300, "x" * 2000, "two\n\nlines", "日本語のとても長い答え" * 30]
)
def test_the_picture_holds_every_answer(processor: Any, photo: Any, tmp_path: Path, answer: str) -> None:
    path = tmp_path / "page.png"
    write_comparison(comparison(answer, "what is it? " * 20), photo, processor, "model", path)
    page = np.asarray(Image.open(path))
    margin = page[:, figures.WIDTH - figures.MARGIN + 2 :]
    assert (margin == 255).all() and (page[-10:] == 255).all()
    assert (page < 128).any()
    short = comparison("yes", "what is it? " * 20)
    write_comparison(short, photo, processor, "model", path)
    assert (page.shape[0] > Image.open(path).height) == (len(answer) > 300)


def test_lines_fit_and_lose_nothing() -> None:
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), figures.font(17)
    text = "a few words and Donaudampfschifffahrtsgesellschaftskapitän " * 3
    lines = figures.wrap(draw, text, font, 120)
    assert max(draw.textlength(line, font) for line in lines) <= 120
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert figures.wrap(draw, "", font, 120) == [""]
    assert figures.wrap(draw, "WW", font, 1) == ["W", "W"]  # never nothing, however narrow


def test_without_a_font_of_the_system_pillows_own_serves(
    processor: Any, photo: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    truetype = figures.ImageFont.truetype

    def without_files(font: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(font, str):
            raise OSError("cannot open resource")
        return truetype(font, *rest, **options)

    monkeypatch.setattr(figures.ImageFont, "truetype", without_files)
    write_comparison(comparison(), photo, processor, "model", tmp_path / "page.PNG")
    assert Image.open(tmp_path / "page.PNG").width == figures.WIDTH


def test_a_mosaic_has_one_tile_per_token(photo: Image.Image) -> None:
    tiles = figures.mosaic(photo, 4, 10)
    assert np.array_equal(np.asarray(tiles), np.asarray(photo.resize((10, 10), Image.Resampling.NEAREST)))
    assert len(np.unique(np.asarray(figures.mosaic(photo, 1, 10)))) == 1


# The command.


def run(monkeypatch: Any, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["delta-llava", "budget", *arguments])
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


SHORT = ["--max-new-tokens", "3", "--repeats", "1"]


def test_the_command_prints_a_table(monkeypatch: Any, capsys: Any, repo: Path, photo_path: str) -> None:
    assert run(monkeypatch, str(repo), photo_path, "[bold]what?[/bold]", *SHORT) == 0
    out = capsys.readouterr().out
    assert "[bold]what?[/bold]" in out and "auto: 4" in out and " 144 " in out and "first token, ms" in out
    assert "Medians of 1 runs after a warm-up" in out


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_the_command_prints_json_and_writes_a_file(
    monkeypatch: Any, capsys: Any, repo: Path, photo_path: str, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"out.{suffix}"
    choice = ["--num-visual-tokens", "36", "--num-visual-tokens", "auto"]
    assert run(monkeypatch, str(repo), photo_path, "what?", *SHORT, *choice, "--json", "--output", str(path)) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["model"], report["prompt"]) == ("tiny", "what?")
    assert [(row["visual_tokens"], row["picked"]) for row in report["runs"]] == [(36, False), (4, True)]
    assert "vision tower" in report["times"]
    assert path.stat().st_size > 1000 and "wrote" in captured.err


def damaged(repo: Path, folder: Path, how: str) -> Path:
    """A copy of the repo with one thing wrong."""
    import shutil

    copy = folder / "damaged"
    shutil.copytree(repo, copy)
    config = copy / "config.json"
    if how == "another model":
        config.write_text(json.dumps({"model_type": "llava"}))
    elif how == "no type":
        config.write_text("{}")
    elif how == "no JSON":
        config.write_text("{")
    elif how == "no config":
        config.unlink()
    elif how == "no processor":
        (copy / "processor_config.json").unlink()
    elif how == "cut weights":
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no weights":
        (copy / "model.safetensors").unlink()
    elif how == "missing weights":
        tensors = load_file(copy / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("another model", "is a llava, not a delta_llava; `delta-llava convert` makes a repo"),
        ("no type", "is no model: its config.json names no model_type."),
        ("no JSON", "is no model: config.json is not valid JSON: "),
        ("no config", "is no model: it has no config.json."),
        ("no processor", "has no processor: its processor_config.json is missing."),
        ("cut weights", "cannot be loaded: "),
        ("no weights", "cannot be loaded: "),
        ("missing weights", "cannot be used: 1 weights are missing, among them lm_head.weight."),
    ],
)
def test_a_repo_that_is_none_is_one_sentence(
    monkeypatch: Any, capsys: Any, repo: Path, photo_path: str, tmp_path: Path, how: str, message: str
) -> None:
    folder = damaged(repo, tmp_path, how)
    assert run(monkeypatch, str(folder), photo_path, "what?", *SHORT) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith(f"delta-llava: {folder} {message}") and last.endswith(".")
    assert not captured.out and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: "nowhere/at/all"}, "nowhere/at/all is not a folder, and not a Hub id (owner/name) either."),
        ({1: "nowhere.jpg"}, "nowhere.jpg: there is no such image."),
        ({1: __file__}, f"{__file__} is not an image that can be read: "),
        ({3: "--num-visual-tokens=5"}, "num_visual_tokens=5: this model cannot give it; use one of 144, 36, 16"),
        (
            {3: "--num-visual-tokens=-4"},
            "`num_visual_tokens` must be an integer or 'auto', or one per image, not '-4'",
        ),
        ({3: "--num-visual-tokens=4.0"}, "`num_visual_tokens` must be an integer or 'auto'"),
        ({3: "--auto-max-loss=7"}, "`auto_max_loss` must be a number from 0 to 1, not 7.0."),
        ({3: "--repeats=0"}, "repeats=0: use at least 1."),
        ({3: "--dtype=int8"}, "dtype='int8': use one of float32, bfloat16, float16."),
        ({3: "--device=abacus"}, "device='abacus' is not to be had here: "),
        ({3: "--output=table.pdf"}, "table.pdf: name a file that ends in .html or .png."),
        (
            {3: "--output=no/such/folder/table.png"},
            "no/such/folder/table.png: the folder no/such/folder does not exist.",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    monkeypatch: Any, capsys: Any, repo: Path, photo_path: str, changes: dict[int, str], message: str
) -> None:
    arguments = [str(repo), photo_path, "what?", "--max-new-tokens=1"]
    for place, value in changes.items():
        arguments[place] = value
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith(f"delta-llava: {message}") and line.endswith(".")
    assert not captured.out


def test_a_picture_may_be_a_data_uri_and_a_damaged_one_is_refused(photo: Image.Image, photo_path: str) -> None:
    import base64

    data = Path(photo_path).read_bytes()
    loaded = load_picture("data:image/png;base64," + base64.b64encode(data).decode())
    assert np.array_equal(np.asarray(loaded.convert("RGB")), np.asarray(photo))
    with pytest.raises(ValueError, match="is not an image that can be read"):
        load_picture("data:image/png;base64," + base64.b64encode(data[:60]).decode())


def test_a_repo_is_loaded_as_asked(repo: Path) -> None:
    model, processor = load_repo(str(repo), dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    assert tuple(processor.visual_token_budgets) == tuple(model.config.visual_token_budgets)


def test_a_prompt_longer_than_the_models_positions_is_refused(repo: Path, photo: Image.Image) -> None:
    model, processor = load_repo(str(repo))
    model.config.text_config.max_position_embeddings = 200
    with pytest.raises(ValueError, match="too long: it has more than 200 tokens"):
        compare_budgets(model, processor, photo, "a" * 10**6)
    with pytest.raises(ValueError, match="and the model has 200 positions; shorten it, or use fewer visual tokens"):
        compare_budgets(model, processor, photo, "a" * 150, [144])
    with pytest.raises(ValueError, match="too long"):
        explain(model, processor, photo, "a" * 10**6)


def test_a_url_that_keeps_silent_or_answers_404(monkeypatch: Any) -> None:
    monkeypatch.setattr(image_utils_delta_llava, "URL_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ValueError, match="timed out"):
        load_picture(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "delta_llava", "text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000: "),
        ({"model_type": "llava"}, "a llava, not a delta_llava"),
    ],
)
def test_a_config_on_the_hub_is_checked_like_one_in_a_folder(
    monkeypatch: Any, tmp_path: Path, config: dict, message: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for load in (load_config, load_repo):
        with pytest.raises(DeltaLlavaError, match=f"^someone/model is .*{message}"):
            load("someone/model")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "it has no config.json"),
        ("{", "config.json is not valid JSON"),
        ("[" * 10**5, "config.json is not valid JSON"),
        ('{"model_type": 7}', "names no model_type"),
        ('{"model_type": "llava"}', "is a llava, not a delta_llava"),
        ('{"model_type": "delta_llava", "scale_factor": "two"}', "cannot be loaded: "),
        ('{"model_type": "delta_llava", "vision_config": 3}', "cannot be loaded: |is no model: "),
        ('{"model_type": "delta_llava", "text_config": {"model_type": "none"}}', "cannot be loaded: "),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, config: str | None, message: str) -> None:
    (tmp_path / "processor_config.json").write_text("{}")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    for load in (load_config, load_repo):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path))
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json in .* is not a regular file"):
        load_config(str(tmp_path))
