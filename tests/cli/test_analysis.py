"""`delta-llava budget`, `explain`, `profile` and `evaluate`: tables and JSON on stdout, figures whole, bad input in one sentence."""

import json
from pathlib import Path

import pytest
from PIL import Image

from transformers_delta_llava.analysis import figures


@pytest.fixture
def photo(tmp_path, monkeypatch) -> Path:
    """Two tiles by two, so that auto picks 4; in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    image = Image.new("L", (24, 24))
    for corner in ((12, 0), (0, 12)):
        image.paste(200, (*corner, corner[0] + 12, corner[1] + 12))
    image.save("photo.png")
    return Path("photo.png")


SHORT = ("--max-new-tokens", 3)


def test_budget(call, tiny_repo, photo) -> None:
    code, out, _ = call("budget", tiny_repo, photo, "[bold]what?[/bold]", *SHORT, "--repeats", 1)
    assert code == 0 and "[bold]what?[/bold]" in out and "auto: 4" in out and " 144 " in out
    assert "first token, ms" in out and "Medians of 1 runs after a warm-up" in out
    options = ("--num-visual-tokens", 36, "--num-visual-tokens", "auto", "--json", "--output", "out.svg")
    code, out, err = call("budget", tiny_repo, photo, "what?", *SHORT, "--repeats", 1, *options)
    report = json.loads(out)
    assert (code, report["model"], report["prompt"]) == (0, "tiny", "what?") and "vision tower" in report["times"]
    assert [(run["num_visual_tokens"], run["chosen_by_auto"]) for run in report["runs"]] == [(36, False), (4, True)]
    assert err == "wrote out.svg\n" and sorted(Path().iterdir()) == [Path("out.svg"), photo]


def test_explain(call, tiny_repo, photo) -> None:
    code, out, err = call("explain", tiny_repo, photo, "[bold]what?", *SHORT)
    assert code == 0 and "[bold]what?" in out and "explained" in out
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")] == ["36", "16", "9"]
    assert err == "wrote explain.png\n" and sorted(Path().iterdir()) == [Path("explain.png"), photo]


@pytest.mark.parametrize(("on", "side"), [("visual_tokens", 2), ("patches", 12)])
def test_explain_in_json(call, tiny_repo, photo, on, side) -> None:
    options = [
        "--num-visual-tokens",
        4,
        "--num-visual-tokens",
        "auto",
        "--on",
        on,
        *SHORT,
        "--json",
        "--output",
        "a.svg",
    ]
    code, out, _ = call("explain", tiny_repo, photo, "what?", *options, "--token", 1)
    report = json.loads(out)
    assert code == 0 and (report["model"], report["prompt"], report["on"]) == ("tiny", "what?", on)
    first, auto = report["runs"]
    assert first["num_visual_tokens"] == auto["num_visual_tokens"] == 4
    assert len(first["saliency"]) == len(first["saliency"][0]) == side
    assert first["token"] == first["answer"].split()[1]
    by_text = call("explain", tiny_repo, photo, "what?", *options, "--token", first["token"])[1]
    assert json.loads(by_text)["runs"][0]["answer"] == first["answer"]


NO_TOKEN = "the answer with 36 visual tokens does not have it; its tokens are 0 "
BAD_INPUT = [
    ("budget", {0: "nowhere/at/all"}, "nowhere/at/all is not a folder, and not a Hub id (owner/name) either."),
    ("explain", {1: "nowhere.jpg"}, "nowhere.jpg: there is no such image."),
    ("budget", {1: __file__}, f"{__file__} is not an image that can be read: "),
    ("explain", {2: "  "}, "The prompt is empty: ask something about the image."),
    ("budget", {3: "--num-visual-tokens=5"}, "num_visual_tokens=5: this model cannot give it; use one of 144, 36"),
    (
        "budget",
        {3: "--num-visual-tokens=-4"},
        "`num_visual_tokens` must be an integer or 'auto', or one per image, not",
    ),
    ("explain", {3: "--num-visual-tokens=many"}, "`num_visual_tokens` must be an integer or 'auto'"),
    ("budget", {3: "--auto-max-loss=7"}, "`auto_max_loss` must be a number from 0 to 1, not 7.0."),
    ("budget", {3: "--repeats=0"}, "repeats=0: use at least 1."),
    ("budget", {3: "--max-new-tokens=0"}, "max_new_tokens=0: use at least 1."),
    ("explain", {3: "--max-new-tokens=0"}, "max_new_tokens=0: use at least 1."),
    ("explain", {3: "--token=5"}, f"token=5: {NO_TOKEN}"),
    ("explain", {3: "--token=giraffe"}, f"token='giraffe': {NO_TOKEN}"),
    ("explain", {3: "--on=pixels"}, "on='pixels': use 'visual_tokens' or 'patches'."),
    ("budget", {3: "--dtype=int8"}, "dtype='int8': use one of float32, bfloat16, float16."),
    ("explain", {3: "--device=abacus"}, "device='abacus' cannot be used: "),
    ("budget", {3: "--output=table.html"}, "table.html: name a file that ends in .png or .svg."),
    ("explain", {3: "--output=figure"}, "figure: name a file that ends in .png or .svg."),
    ("explain", {3: "--output=no/such/a.png"}, "no/such/a.png: the folder no/such does not exist."),
    ("explain", {3: "--output=folder.png"}, "folder.png: this is a folder."),
]


@pytest.mark.parametrize(("command", "changes", "message"), BAD_INPUT)
def test_bad_input_is_one_sentence(call, tiny_repo, photo, command, changes, message) -> None:
    Path("folder.png").mkdir()
    arguments = {0: tiny_repo, 1: photo, 2: "what?", 3: "--json", **changes}
    short = [] if "max-new-tokens" in str(changes) else ["--max-new-tokens=2"]
    code, out, err = call(command, *arguments.values(), *short)
    (line,) = err.strip().splitlines()
    assert code == 2 and line.startswith(f"delta-llava: {message}") and line.endswith(".")
    assert not out and sorted(Path().iterdir()) == [Path("folder.png"), photo]


def test_a_figure_that_cannot_be_written_is_refused_at_once(call, photo, monkeypatch) -> None:
    monkeypatch.setattr(figures.os, "access", lambda path, mode: False)  # root may write everything
    code, _, err = call("explain", "no/repo", photo, "what?", "--output", "a.png")
    assert (code, err) == (2, "delta-llava: a.png is not writable.\n")


def test_profile(call, tiny_model, tmp_path) -> None:
    tiny_model.config.save_pretrained(tmp_path / "repo")
    plot = tmp_path / "plot.svg"
    rates = ("--flops-per-second", 7e14, "--bytes-per-second", 3.35e12, "--num-visual-tokens", 36)
    lengths = ("--text-tokens", 5, "--new-tokens", 3)
    code, out, _ = call("profile", tmp_path / "repo", "--json", *lengths, "--plot", plot)
    report = json.loads(out)
    assert code == 0 and [budget["num_visual_tokens"] for budget in report["budgets"]] == [144, 36, 16, 9, 4, 1]
    assert (report["text_tokens"], report["new_tokens"]) == (5, 3) and "roofline" not in report
    assert report["budgets"][0]["exact_flops"]["prefill"] > report["budgets"][1]["exact_flops"]["prefill"]
    assert "0.0216" in report["note"] and "visual tokens per image" in plot.read_text()
    (floor,) = json.loads(call("profile", tmp_path / "repo", "--json", *rates)[1])["roofline"]
    table = call("profile", tmp_path / "repo", *rates)[1]
    assert f"{1000 * floor['first_token']:.3f}" in table and "Shortest times, ms: 7e+14 FLOP/s" in table
    assert "KV cache" in table


def test_profile_of_a_shape(call) -> None:
    out = call("profile", "0.5b", "--num-visual-tokens", 1)[1]
    assert "tower 303.5" in out and "0.3660" in out and "0.3819" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "dtype='int8': use one of"),
        (["--flops-per-second", "7e14"], "--flops-per-second and --bytes-per-second go together"),
        (["--plot", "plot.pdf"], "plot.pdf: name a file that ends in .png or .svg."),
    ],
)
def test_bad_options_of_profile(call, options, message) -> None:
    code, out, err = call("profile", "0.5b", *options)
    assert (code, out) == (2, "") and err.startswith(f"delta-llava: {message}")


def test_easy_vqa(call, tiny_repo, tmp_path) -> None:
    choice = ("--limit", 6, "--num-visual-tokens", 4, "--num-visual-tokens", "auto", "--auto-max-loss", 1)
    code, out, _ = call("evaluate", "easy-vqa", tiny_repo, *choice, "--output", tmp_path / "numbers.json")
    report = json.loads((tmp_path / "numbers.json").read_text())
    assert (code, report["questions"], report["model"]) == (0, 6, "tiny")
    four, auto = report["results"]
    assert four["num_visual_tokens"] == 4 and four["scores"]["overall"]["accuracy"] == 0.0  # random weights
    assert (auto["num_visual_tokens"], auto["auto_max_loss"]) == ("auto", 1)
    assert (auto["mean_visual_tokens"], auto["budgets"]) == (1, {"1": 6})
    alone = report["question_alone"]["overall"]
    assert f"{alone['accuracy']:.2f} ({alone['interval_95'][0]:.2f} to" in out
    assert "4 visual tokens" in out and "auto, loss up to 1" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-visual-tokens", 5], "num_visual_tokens=5: this model cannot give it; use one of 144, 36"),
        (["--num-visual-tokens", "many"], "`num_visual_tokens` must be an integer or 'auto'"),
        (["--num-visual-tokens", "auto", "--auto-max-loss", 2], "auto_max_loss=2.0: use a share from 0 to 1."),
        (["--auto-max-loss", 0.2], "auto_max_loss goes with num_visual_tokens=auto."),
        (["--batch-size", 0], "batch_size=0: ask at least one"),
        (["--limit", 0], "limit=0: ask at least one"),
        (["--output", "no/such/folder/x.json"], "--output no/such/folder/x.json: name a file in a folder that exists"),
    ],
)
def test_bad_options_of_easy_vqa(call, tiny_repo, options, message) -> None:
    code, out, err = call("evaluate", "easy-vqa", tiny_repo, "--limit", 4, *options)
    assert (code, out) == (2, "") and err.startswith(f"delta-llava: {message}")
