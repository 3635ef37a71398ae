"""`delta-llava delta`: paths and JSON on stdout, talk on stderr, one sentence and code 2 where something is wrong."""

import json
import sys

import pytest

from tests.deltas.conftest import make
from transformers_delta_llava.cli.main import main


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command; returns its exit code, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["delta-llava", "delta", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def test_commands(call, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "repo")
    model.load_delta_state_dict({name: t * 2 for name, t in model.delta_state_dict().items()})
    model.save_pretrained(tmp_path / "tuned")

    code, out, err = call("extract", tmp_path / "repo", tmp_path / "deltas", "--dtype", "bfloat16")
    assert (code, out) == (0, f"{tmp_path / 'deltas'}\n")
    assert "rank 4, 2,560 numbers" in err and "energy kept: 0.9999" in err
    code, out, err = call(
        "extract", tmp_path / "tuned", tmp_path / "difference", "--base", tmp_path / "repo", "--json"
    )
    assert code == 0 and not err
    assert json.loads(out)["energy"] == pytest.approx(1, abs=1e-6)
    code, out, err = call("truncate", tmp_path / "difference", tmp_path / "low", "--rank", 2, "--json")
    report = json.loads(out)
    assert code == 0 and (report["rank"], set(report["energy_by_projection"])) == (2, {"q_proj", "k_proj", "v_proj"})
    assert call("truncate", tmp_path / "difference", tmp_path / "most", "--energy", 0.5)[0] == 0
    assert call("apply", tmp_path / "repo", tmp_path / "low", tmp_path / "applied")[:2] == (
        0,
        f"{tmp_path / 'applied'}\n",
    )
    merged = call("merge", tmp_path / "repo", tmp_path / "merged", "--deltas", tmp_path / "low", "--rank", 1)
    assert merged[:2] == (0, f"{tmp_path / 'merged'}\n")

    code, out, err = call("stats", tmp_path / "low", "--base", tmp_path / "repo", "--plot", tmp_path / "plot.svg")
    assert code == 0 and out.count("k_proj") == 4 and "plot.svg" in err
    code, out, err = call("stats", tmp_path / "repo", "--json")
    rows = json.loads(out)
    assert code == 0 and not err and len(rows) == 9 and len(rows[0]["singular_values"]) == 4


def test_warns_of_what_deltas_cannot_hold(call, tmp_path):
    for seed in (0, 1):
        make(seed).save_pretrained(tmp_path / str(seed))
    code, out, err = call("extract", tmp_path / "1", tmp_path / "out", "--base", tmp_path / "0", "--rank", 8)
    assert code == 0 and out == f"{tmp_path / 'out'}\n"
    assert "other tensors of the two projectors differ" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("extract", "repo", "repo"), "exists"),
        (("extract", "nowhere", "out"), "not a folder"),
        (("extract", "repo", "out", "--rank", "3"), "A rank needs a base"),
        (("truncate", "repo", "out"), "either a rank or an energy"),
        (("truncate", "repo", "out", "--rank", "9"), "rank=9"),
        (("apply", "repo", "repo", "out"), "Expected a model and a delta repo"),
        (("apply", "repo", "other", "out"), "--force"),
        (("merge", "repo", "out", "--rank", "-1"), "rank=-1"),
        (("merge", "repo", "out", "--max-shard-size", "big"), "max_shard_size"),
        (("stats", "repo", "--plot", "plot.pdf"), "plot.pdf: name a file that ends in .png or .svg"),
    ],
)
def test_bad_input_is_one_sentence(call, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("repo")
    make(1).save_deltas("other")
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("delta-llava: ") and words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
