"""`delta-llava profile`."""

import json
from pathlib import Path

from typer.testing import CliRunner

from tests.tiny import tiny_config
from transformers_delta_llava.cli.main import app


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["profile", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_of_a_folder_and_plot(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    plot = tmp_path / "plot.svg"
    report = json.loads(run(str(tmp_path), "--json", "--text-tokens", "5", "--new-tokens", "3", "--plot", str(plot)))
    assert [budget["num_visual_tokens"] for budget in report["budgets"]] == [144, 36, 16, 9, 4, 1]
    assert (report["text_tokens"], report["new_tokens"]) == (5, 3)
    assert report["budgets"][0]["exact_flops"]["prefill"] > report["budgets"][1]["exact_flops"]["prefill"]
    assert "0.0216" in report["note"]
    assert plot.read_text().count("<rect") == 1 + 6 * 4 + 4


def test_tables_of_a_shape() -> None:
    text = run("0.5b", "--num-visual-tokens", "1", "--num-visual-tokens", "144")
    assert "tower 303.5" in text and "0.3660" in text and "0.3819" in text
    assert "KV cache" in text


def test_a_bad_dtype_is_refused() -> None:
    result = CliRunner().invoke(app, ["profile", "0.5b", "--dtype", "int8"])
    assert isinstance(result.exception, ValueError) and "dtype='int8'" in str(result.exception)


def test_roofline_in_both_forms() -> None:
    rates = ("--flops-per-second", "7e14", "--bytes-per-second", "3.35e12")
    setting = ("0.5b", "--num-visual-tokens", "144", *rates)
    (floor,) = json.loads(run(*setting, "--json"))["roofline"]
    text = run(*setting, "--batch-size", "1")
    assert f"{1000 * floor['first_token']:.3f}" in text and "Shortest times, ms: 7e+14 FLOP/s" in text
    assert floor["limited_by"]["tower"] == "compute" and "roofline" not in json.loads(run(*setting[:3], "--json"))


def test_half_a_roofline_is_refused() -> None:
    result = CliRunner().invoke(app, ["profile", "0.5b", "--flops-per-second", "7e14"])
    assert isinstance(result.exception, ValueError) and "--bytes-per-second together" in str(result.exception)
