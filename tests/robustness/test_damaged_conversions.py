"""A short slice of the fuzzer and of the kills, and proof that both notice what they are there to notice."""

import time

import pytest

from tests.robustness import damages, fuzz_conversions, kill_conversions


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "whole").mkdir()
    return tmp_path / "whole"


@pytest.mark.parametrize(("target", "cases"), [("checkpoint", 16), ("lora", 8), ("repo", 5), ("deltas", 6)])
def test_damaged_sources(folder, target, cases):
    result = fuzz_conversions.run(cases, 1, folder, target=target)
    assert result["failures"] == []
    assert sum(count for name, count in result.items() if name.endswith("refused")) > 1


def test_kills(tmp_path):
    result = kill_conversions.run(4, 1, tmp_path)
    assert result["failures"] == []
    assert result["kills"] > 0


def _crash(source, output, **options):
    raise KeyError("a bug")


def _write_half(source, output, **options):
    output.mkdir()
    raise ValueError("refused too late")


def _hang(source, output, **options):
    while True:
        pass


@pytest.mark.parametrize(
    ("convert", "message"), [(_crash, "KeyError"), (_write_half, "left an output"), (_hang, "hung")]
)
def test_the_fuzzer_notices(folder, monkeypatch, convert, message):
    monkeypatch.setattr(fuzz_conversions, "convert_checkpoint", convert)
    (failure,) = fuzz_conversions.run(1, 0, folder, timeout=1)["failures"]
    assert message in failure


def test_the_fuzzer_notices_a_wrong_result(folder, monkeypatch):
    convert = fuzz_conversions.convert_checkpoint

    def undo_the_damage(source, output):
        convert(folder / "safetensors-1" / "source", output)

    def change_a_value(rng, source):
        file = damages.weight_files(source)[0]
        tensors = damages.load(file)
        next(iter(tensors.values())).view(-1)[0] = 7
        damages.save(tensors, file)
        return "one value changed"

    monkeypatch.setattr(fuzz_conversions, "convert_checkpoint", undo_the_damage)
    monkeypatch.setattr(fuzz_conversions, "DAMAGES", (change_a_value,))
    (failure,) = fuzz_conversions.run(1, 0, folder)["failures"]
    assert "wrong result" in failure
    assert "differs" in failure


def test_the_kills_notice_a_half_repo(tmp_path, monkeypatch):
    convert = kill_conversions.convert_checkpoint

    def leave_a_half(source, output, **options):
        card = output / "README.md"
        if card.exists() and card.read_text() == "an earlier conversion":
            card.unlink()
            time.sleep(60)  # the kill comes sooner
        return convert(source, output, **options)

    monkeypatch.setattr(kill_conversions, "convert_checkpoint", leave_a_half)
    monkeypatch.setattr(kill_conversions.random.Random, "uniform", lambda self, low, high: high / 2)
    assert any("half a repo" in failure for failure in kill_conversions.run(2, 0, tmp_path)["failures"])
