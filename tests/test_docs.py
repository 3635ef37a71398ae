"""The pages in docs/ whose code runs as it stands, on small models under the names that they use."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.make_checkpoint import write_checkpoint
from tests.pages import run_page
from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


ROOT = Path(__file__).parents[1]


def test_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs").mkdir()
    run_page("budgets.md", monkeypatch)
    assert (tmp_path / "runs" / "chelsea.png").is_file()


def test_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "llava-v1.5-7b-144")
    run_page("conversion.md", monkeypatch)
    assert (tmp_path / "llava-v1.5-7b-144-again" / "config.json").is_file()
    assert (tmp_path / "projector-alone" / "mm_projector.bin").is_file()


def test_deltas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration(tiny_config()).eval()
    model.save_pretrained("delta-llava-7b")
    for name in ("charts", "maps"):
        model.load_delta_state_dict({n: torch.randn_like(t) / 8 for n, t in model.delta_state_dict().items()})
        model.save_deltas(f"deltas-{name}")
    model.save_pretrained("delta-llava-7b-tuned")
    capsys.readouterr()
    names = run_page("deltas.md", monkeypatch)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "['deltas-charts', 'default', 'maps']"
    assert all(f"{folder}\n" in printed for folder in ("deltas-own", "deltas-small", "delta-llava-7b-merged"))
    assert (tmp_path / "deltas.svg").is_file()
    trained = [name for name, p in names["model"].named_parameters() if p.requires_grad]
    assert trained and all(".delta_" in name for name in trained)


def test_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs").mkdir()
    run_page("explain.md", monkeypatch)
    printed = capsys.readouterr().out
    assert printed.count("│ blue") == 2 * 3 and '"answer": "yes"' in printed
    shown, made = Image.open(ROOT / "docs" / "explain.png"), Image.open("runs/explain.png")
    assert made.size == shown.size  # pixels depend on the fonts of the machine
    assert Image.open("runs/heat.png").size == (336, 336) and (tmp_path / "runs" / "tokens.png").is_file()
