"""`delta-llava delta`: one line on stdout, warnings and errors on stderr."""

from tests.modeling.delta_cases import make


def test_commands(call, capsys, tmp_path):
    for seed in (0, 1):
        make(seed).save_pretrained(tmp_path / str(seed))
    capsys.readouterr()  # progress bars of what was saved
    repo, deltas = tmp_path / "0", tmp_path / "deltas"
    assert call("delta", "extract", repo, deltas)[:2] == (0, f"{deltas}: rank 4, 1.000000 of the energy\n")
    code, out, err = call("delta", "extract", tmp_path / "1", tmp_path / "difference", "--base", repo, "--rank", 8)
    assert code == 0 and "rank 8, 0." in out and "feed_forward.fc1.weight" in err
    code, out, _ = call("delta", "truncate", tmp_path / "difference", tmp_path / "low", "--rank", 2)
    assert code == 0 and "rank 2, 0." in out
    code, out, _ = call("delta", "merge", repo, tmp_path / "merged", "--deltas", tmp_path / "low", "--rank", 1)
    assert (code, out) == (0, f"{tmp_path / 'merged'}\n")
    code, out, err = call("delta", "truncate", deltas, tmp_path / "none", "--rank", 9)
    assert code != 0 and not out and "rank=9" in err and not (tmp_path / "none").exists()
