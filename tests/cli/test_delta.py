"""`delta-llava delta`: paths and JSON on stdout, sentences on stderr, one sentence and code 2 where something is wrong."""

import json

import pytest

from tests.modeling.delta_cases import make


@pytest.fixture
def delta(call, capsys):
    def run(*arguments):
        capsys.readouterr()  # progress bars of what was saved before
        return call("delta", *arguments)

    return run


def test_commands(delta, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "repo")
    model.load_delta_state_dict({name: t * 2 for name, t in model.delta_state_dict().items()})
    model.save_pretrained(tmp_path / "tuned")

    code, out, err = delta("extract", tmp_path / "repo", tmp_path / "deltas", "--dtype", "bfloat16")
    assert (code, out) == (0, f"{tmp_path / 'deltas'}\n")
    assert "rank 4, 2,560 numbers" in err and "energy kept: 0.9999" in err
    code, out, err = delta(
        "extract", tmp_path / "tuned", tmp_path / "difference", "--base", tmp_path / "repo", "--json"
    )
    assert code == 0 and not err
    assert json.loads(out)["energy"] == pytest.approx(1, abs=1e-6)
    code, out, err = delta("truncate", tmp_path / "difference", tmp_path / "low", "--rank", 2, "--json")
    report = json.loads(out)
    assert code == 0 and (report["rank"], set(report["energy_by_projection"])) == (2, {"query", "key", "value"})
    assert delta("truncate", tmp_path / "difference", tmp_path / "most", "--energy", 0.5)[0] == 0
    assert delta("apply", tmp_path / "repo", tmp_path / "low", tmp_path / "applied")[:2] == (
        0,
        f"{tmp_path / 'applied'}\n",
    )
    merged = delta("merge", tmp_path / "repo", tmp_path / "merged", "--deltas", tmp_path / "low", "--rank", 1)
    assert merged[:2] == (0, f"{tmp_path / 'merged'}\n")


def test_warns_of_what_deltas_cannot_hold(delta, tmp_path):
    for seed in (0, 1):
        make(seed).save_pretrained(tmp_path / str(seed))
    code, out, err = delta("extract", tmp_path / "1", tmp_path / "out", "--base", tmp_path / "0", "--rank", 8)
    assert code == 0 and out == f"{tmp_path / 'out'}\n"
    assert "other tensors of the two projectors differ" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("extract", "repo", "repo"), "exists"),
        (("extract", "nowhere", "out"), "not a folder"),
        (("truncate", "repo", "out", "--rank", "9"), "rank=9"),
        (("apply", "repo", "other", "out"), "--force"),
        (("merge", "repo", "out", "--max-shard-size", "big"), "big"),
    ],
)
def test_bad_input_is_one_sentence(delta, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("repo")
    make(1).save_deltas("other")
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = delta(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("delta-llava delta: ") and words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
