"""The measuring of benchmarks measures what it says, and every script runs."""

import argparse
import importlib
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.harness import peak_bytes, products_alone, side_by_side
from benchmarks.harness.models import build_pair, make_inputs


def test_times_are_medians_of_turns() -> None:
    calls: list[str] = []

    def sleep(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    arguments = argparse.Namespace(device="cpu", clock="wall", seconds=0.05, rounds=None)
    functions = {"short": partial(sleep, "short", 0.002), "long": partial(sleep, "long", 0.01)}
    times = side_by_side(functions, arguments)
    assert 0.002 <= times["short"] < times["long"] and times["long"] >= 0.01
    assert calls == ["short", "long"] * (len(calls) // 2) and len(calls) >= 8


def test_peak_memory_of_a_call() -> None:
    x = torch.randn(1000, 100)
    assert peak_bytes(lambda: (x + 1) * 2) == pytest.approx(2 * x.nbytes, abs=100)
    assert peak_bytes(lambda: (x + 1).add_(1)) == pytest.approx(x.nbytes, abs=100)


def test_products_are_replayed_and_counted() -> None:
    linear, x = torch.nn.Linear(8, 16), torch.randn(4, 8)

    def function() -> torch.Tensor:
        hidden = linear(x)  # addmm
        hidden.addmm_(x, torch.ones(8, 16))
        return torch.bmm(hidden[None], torch.ones(1, 16, 2)).relu() @ torch.ones(2, 3)

    run, flops = products_alone(function)
    assert flops == 2 * (4 * 8 * 16 + 4 * 8 * 16 + 4 * 16 * 2 + 4 * 2 * 3)
    run()


def test_a_pair_shares_all_but_its_projectors() -> None:
    ours, llava = build_pair("tiny", "cpu", torch.float32)
    for name in ("vision_tower", "language_model"):
        assert getattr(ours.model, name) is getattr(llava.model, name)
    inputs = make_inputs(llava, 576, 12, 2)
    with torch.no_grad():
        assert llava(**inputs).logits.shape == ours(**inputs, num_visual_tokens=576).logits.shape == (2, 588, 512)


@pytest.mark.parametrize(
    "script, options",
    [
        ("projector", ["--scale-factors", "2", "--batch-sizes", "1"]),
        ("end_to_end", ["--budgets", "16", "--new-tokens", "3"]),
        ("training_step", ["--budgets", "16"]),
        ("processing", ["--images", "2", "--skip-loading"]),
        ("scaling", []),
    ],
)
def test_script_writes_its_results(script: str, options: list[str], tmp_path: Path, monkeypatch) -> None:
    fixed = ["--shape", "tiny", "--rounds", "1", "--threads", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [script, *fixed, *options])
    module = importlib.import_module(f"benchmarks.{script}")
    if script == "scaling":
        monkeypatch.setattr(module, "SWEEPS", {"levels": [{"levels": 1}, {"levels": 2}]})
    with torch.random.fork_rng():
        module.main()
    [results] = tmp_path.glob("*.json")
    report = json.loads(results.read_text())
    assert report["benchmark"].startswith(script) and report["torch"] == torch.__version__
    assert report["options"]["shape"] == "tiny"
    assert str(tmp_path) not in results.read_text()
