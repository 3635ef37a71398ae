"""The run on a GPU, rehearsed: parts fail alone, rows are on disk at once, figures of a rehearsal never pass for measured ones."""

import importlib
import json
import os
import sys
import time
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gpu_report
import on_gpu
import write_performance_page
from gpu_parts import NO_DEVICE, PARTS, answers, quantised
from gpu_parts.report import Report, captured, milliseconds
from harness.models import LLAVA, build_pair


# Children in place of the parts, without PyTorch: each writes a row, then does what its word says.
CHILD = """
import json, os, sys, time
path, word = sys.argv[1:]
if word == "dies at once":
    sys.exit("no such module")
seconds = float(sys.stdin.readline())
if word == "no device":
    sys.exit(3)
if word != "is silent":
    with open(path, "w") as file:
        json.dump({"part": "x", "rows": [{"seconds": seconds}], "errors": [], "rehearsal": False}, file)
if word == "fails":
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
if word == "is killed":
    os.kill(os.getpid(), 9)
if word == "hangs":
    open(path + ".pid", "w").write(str(os.getpid()))
    time.sleep(60)
"""


def run(output: Path, words: dict[str, str], limit: float = 20.0, seconds: float = 100.0) -> dict[str, str]:
    """Run children that do what the words say."""

    def command(name: str) -> list[str]:
        return [sys.executable, "-S", "-c", CHILD, str(output / f"{name}.json"), words[name]]

    return on_gpu.run_parts(dict.fromkeys(words, limit), command, output, seconds)


def read(output: Path, name: str) -> dict:
    return json.loads((output / f"{name}.json").read_text())


@pytest.mark.parametrize("failing", [list(PARTS)[0], list(PARTS)[-1]])
def test_a_part_that_fails_leaves_the_others_whole(
    failing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = run(tmp_path, {name: "fails" if name == failing else "works" for name in PARTS})
    assert statuses == {name: "failed" if name == failing else "done" for name in PARTS}
    for name in PARTS:
        assert len(read(tmp_path, name)["rows"]) == 1  # what was measured before is kept
        assert read(tmp_path, name)["status"] == statuses[name]
    assert "illegal memory access" in read(tmp_path, failing)["problems"][0]
    assert "illegal memory access" in (tmp_path / "log.txt").read_text()
    assert len(capsys.readouterr().out.splitlines()) == len(PARTS)
    assert len(list(tmp_path.iterdir())) <= 8  # what machines that are lent out give back


def test_every_bad_end_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "LEAST", 0.0)
    words = ["hangs", "works", "is killed", "is silent", "dies at once", "works"]
    named = {f"{index} {word}": word for index, word in enumerate(words)}
    statuses = run(tmp_path, named, limit=1.5)
    assert list(statuses.values()) == ["timed out", "done", "failed", "done", "failed", "done"]
    assert len(read(tmp_path, "0 hangs")["rows"]) == 1  # a limit keeps the rows before it
    assert read(tmp_path, "3 is silent")["rows"] == [] and read(tmp_path, "4 dies at once")["problems"] == [
        "no such module"
    ]
    hanging = int((tmp_path / "0 hangs.json.pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(hanging, 0)


def test_when_time_is_up_the_rest_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "LEAST", 0.5)
    (tmp_path / "late.json").write_text('{"rows": [1]}')  # of an earlier run
    start = time.monotonic()
    statuses = run(tmp_path, {"hangs": "hangs", "late": "works"}, seconds=1.5)
    assert statuses == {"hangs": "timed out", "late": "not started"} and time.monotonic() - start < 30
    assert read(tmp_path, "late")["rows"] == []


def test_without_a_gpu_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert NO_DEVICE == 3
    assert run(tmp_path, {"first": "no device", "second": "works"}) == {"first": "no device"}
    assert not list(tmp_path.glob("*.json"))
    monkeypatch.setattr(on_gpu, "run_parts", lambda *_: {"first": "no device"})
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        on_gpu.main()
    assert stopped.value.code == 2 and "finds no GPU" in capsys.readouterr().err


def test_errors_within_a_part_show_in_its_line(tmp_path: Path) -> None:
    path = tmp_path / "correctness.json"
    wrong = {"check": "golden numbers", "value": 0.5, "ok": False}
    path.write_text(json.dumps({"part": "x", "rows": [wrong], "errors": [{"what": "flex", "error": "no"}]}))
    status, line = on_gpu.finish(path, "done", 1.0, "")
    assert status == "with errors" and "2 problems, the last: golden numbers: 0.5" in line


def test_wheels_that_were_carried_along_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "")
    monkeypatch.setattr(on_gpu, "WHEELS", tmp_path)
    environment = on_gpu.environment(tmp_path / "site")
    paths = environment["PYTHONPATH"].split(os.pathsep)
    assert (tmp_path / "site" / "carried" / "__init__.py").is_file() and str(tmp_path / "site") in paths
    assert paths[0] == str(on_gpu.ROOT / "src")


# ---------------------------------------------------------------------------- inside a part


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report("end_to_end_13b", tmp_path, True, 100.0)


def test_rows_and_errors_are_on_disk_at_once(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.add(ms=1.0)
    assert read(tmp_path, "end_to_end_13b")["rows"] == [{"ms": 1.0}]
    assert report.attempt("works", lambda: 7) == 7 and report.attempt("divides", lambda: 1 / 0) is None
    written = read(tmp_path, "end_to_end_13b")
    assert written["errors"] == [{"what": "divides", "error": "ZeroDivisionError: division by zero"}]
    assert written["rehearsal"] is True and written["status"] == "running"
    report.rehearse = False
    assert report.attempt("long", lambda: 7, seconds=1000.0) is None
    assert read(tmp_path, "end_to_end_13b")["left_out"] == ["long"]


def test_every_part_has_its_function_and_its_section() -> None:
    for name, part in PARTS.items():
        assert callable(getattr(importlib.import_module(f"gpu_parts.{part.module}"), name))
    assert {f"gpu_{name}" for name in PARTS} == set(gpu_report.GPU_SECTIONS)
    page = write_performance_page.PAGE.read_text()
    assert all(f"<!-- {name} -->" in page for name in gpu_report.GPU_SECTIONS)


def test_times_are_medians_in_turns() -> None:
    calls: list[str] = []
    times = milliseconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", 0.0)
    assert calls == ["a", "b"] * 5 and set(times) == {"a", "b"}
    assert captured(calls.clear, "cpu")() is None and calls == []


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return build_pair("tiny", "cpu", torch.float32)


@pytest.mark.parametrize("name, batch", [(LLAVA, 1), (144, 2), (1, 1)])
@torch.no_grad()
def test_captured_answers_are_those_of_generate(pair, name, batch: int) -> None:
    side = answers.make_side(pair, name, batch)
    seconds, expected = answers.generate(side, 6, "cpu")
    assert len(seconds) == 6 and seconds == sorted(seconds)
    answer = answers.GraphAnswer(side, 6, "cpu")
    for _ in range(2):  # a second answer starts from an empty cache
        assert torch.equal(answer.tokens(6), expected)
    assert len(answer.seconds(6)) == 6
    assert side.language_model.config._attn_implementation == "sdpa"


class NeverWait(TorchDispatchMode):
    """Refuses to bring a value to Python, which no captured graph can."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert not {"_local_scalar_dense", "nonzero", "equal"} & {operation._schema.name.removeprefix("aten::")}
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [LLAVA, 576, 144])
@torch.no_grad()
def test_what_is_captured_never_waits_for_the_device(pair, name, monkeypatch: pytest.MonkeyPatch) -> None:
    side = answers.make_side(pair, name, 2)
    answer, projector = answers.GraphAnswer(side, 4, "cpu"), side.projector_call()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers takes other ways then
    with NeverWait():
        answer.run_prefill()
        answer.step()
        projector()


@torch.no_grad()
def test_compiled_pieces_change_no_token_and_are_put_back(pair) -> None:
    side = answers.make_side(pair, 36, 1)
    expected = answers.GraphAnswer(side, 4, "cpu").tokens(4)
    with answers.compiled_pieces(side.model, "eager"):
        assert "forward" in vars(side.language_model.layers[0].mlp)
        assert torch.equal(answers.GraphAnswer(side, 4, "cpu").tokens(4), expected)
    assert not any("forward" in vars(module) for module in side.model.modules())


@torch.no_grad()
def test_floors_of_llava_are_of_what_it_computes(pair) -> None:
    ours, llava = pair
    (budget,) = answers.llava_profile(ours, 4).budgets
    llava.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            llava.get_image_features(torch.zeros(1, 3, 336, 336))
    finally:
        llava.set_attn_implementation("sdpa")
    assert budget.exact_flops["tower"] + budget.exact_flops["projector"] == counter.get_total_flops()
    projector = sum(p.numel() for p in llava.model.multi_modal_projector.parameters())
    assert budget.weight_bytes["projector"] == pytest.approx(2 * projector, rel=0.03)  # biases aside


@pytest.mark.parametrize("linear", [quantised.Int8Linear, quantised.Int4Linear])
@torch.no_grad()
def test_quantised_maps_compute_what_their_weights_say(linear) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 64, bias=False), nn.Sequential(nn.Linear(64, 64, bias=False))).bfloat16()
    x = torch.randn(2, 3, 128).bfloat16()
    expected = layers(x).float()
    quantised.replace_linears(layers, linear)
    assert not any(isinstance(module, nn.Linear) for module in layers.modules())
    error = (layers(x).float() - expected).norm() / expected.norm()
    assert error < (0.02 if linear is quantised.Int8Linear else 0.2)
    stored = sum(buffer.nbytes for buffer in layers.buffers())
    assert stored < (128 * 64 + 64 * 64) * (1.1 if linear is quantised.Int8Linear else 0.6)


@torch.no_grad()
def test_another_packing_is_refused() -> None:
    class Shifted(quantised.Int8Linear):
        def dense(self) -> torch.Tensor:
            return super().dense().roll(1, 0)

    with pytest.raises(ValueError, match="its packing is another one here"):
        quantised.replace_linears(nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16(), Shifted)


# ---------------------------------------------------------------------------- the page


def test_a_rehearsal_is_rendered_elsewhere_and_only_there(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.end_to_end_13b(report)
    assert not report.content["errors"] and [row["visual tokens"] for row in report.content["rows"]] == [
        "LLaVA 576",
        144,
        1,
    ]
    assert all(row["tokens as generate's"] == "8 of 8" for row in report.content["rows"])
    page, results = tmp_path / "performance.md", tmp_path / "results"
    page.write_text("<!-- gpu_end_to_end_13b -->\nold\n<!-- end -->\n<!-- gpu_quantised -->\nold\n<!-- end -->\n")

    def render(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["write_performance_page.py", "--gpu", str(tmp_path), *options])
        write_performance_page.main()

    before = write_performance_page.PAGE.read_text()
    for options in ([], ["--page", str(page)], ["--results", str(results)]):
        with pytest.raises(SystemExit) as stopped:
            render(*options)
        assert stopped.value.code == 2 and "figures mean nothing" in capsys.readouterr().err
    assert write_performance_page.PAGE.read_text() == before and not results.exists()
    render("--page", str(page), "--results", str(results))
    text = page.read_text()
    assert "**A rehearsal on the CPU" in text and "| LLaVA 576 | " in text and text.count("Not measured yet.") == 1
    ET.parse(results / "gpu_end_to_end_13b.svg")


def test_goals_are_met_missed_or_not_measured() -> None:
    def row(tokens, batch: int, way: str, **fields: float) -> dict:
        fixed = {"visual tokens": tokens, "batch": batch, "way": way, "projector's share": 0.02, "per token, ms": 5.0}
        return fixed | {"first token, ms": 9.0, "times the floor": 1.9, "of LLaVA's": 0.43, "gain": 0.6} | fields

    content = {
        "part": "end_to_end",
        "status": "timed out",
        "rehearsal": False,
        "hardware": "NVIDIA H100",
        "torch": "2.11",
        "cuda": "13.0",
        "transformers": "5.17.0",
        "date": "2026-12-01",
        "command": "python benchmarks/on_gpu.py OUT",
        "seed": 0,
        "rates": {"flops_per_second": 7e14, "bytes_per_second": 3e12},
        "rows": [
            row(144, 1, "graph"),
            row(1, 1, "dynamic", **{"projector's share": 0.05}),
            row(LLAVA + " 576", 1, "dynamic"),
        ],
    }
    text = "\n".join(gpu_report.end_to_end(content))
    verdict = {
        line.split(" | ")[0]: line.rstrip(" |").rsplit("| ", 1)[1]
        for line in text.splitlines()
        if " <= " in line or " >= " in line
    }
    assert verdict["| first token at 144 tokens, batch 1: times the floor"] == "met"
    assert verdict["| first token at 144 tokens, batch 1: of LLaVA's"] == "**missed**"
    assert verdict["| first token at 144 tokens, batch 32: of LLaVA's"] == "not measured"
    assert verdict["| projector, share of the first token, most"] == "**missed**"
    assert "NVIDIA H100; torch 2.11, CUDA 13.0, transformers 5.17.0; 2026-12-01" in text
    assert "did not end by itself (timed out)" in text and "700 TFLOP/s" in text


def test_a_folder_without_figures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "projector.json").write_text(json.dumps({"rows": [], "rehearsal": False}))
    with pytest.raises(ValueError, match="holds nothing that on_gpu.py measured"):
        gpu_report.take_over(tmp_path, tmp_path / "results", rehearsals=True)
