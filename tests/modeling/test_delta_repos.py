"""Delta repos are written in one piece; those that do not fit change nothing."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.modeling.delta_cases import (
    LAYOUTS,
    assert_same,
    make,
    other_deltas,
    snapshot,
    write_repo,
)
from transformers_delta_llava.modeling.delta_repo_delta_llava import read_delta_config


def test_a_base_is_recognised_in_every_dtype_and_another_one_in_none(released, tmp_path):
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    released.to(torch.bfloat16)
    stranger = make(seed=1).to(torch.bfloat16)
    for saved in dtypes:
        copy.deepcopy(released).to(saved).save_deltas(tmp_path / str(saved))
        for loaded in dtypes:
            model = copy.deepcopy(released).to(loaded)
            model.load_deltas(tmp_path / str(saved), name="x")
            assert model.active_deltas == "x"
            with pytest.raises(ValueError, match="another base"):
                copy.deepcopy(stranger).to(loaded).load_deltas(tmp_path / str(saved))


def test_saved_dtype(released, tmp_path):
    released.save_deltas(tmp_path / "deltas", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "deltas" / "deltas.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "deltas" / "delta_config.json").read_text())["dtype"] == "bfloat16"
    released.load_deltas(tmp_path / "deltas")
    assert {p.dtype for p in released.delta_parameters()} == {torch.float32}


def bad_tensors(model) -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    good = {name: tensor.clone() for name, tensor in model.delta_state_dict().items()}
    name = "query.delta_u"
    nan, inf, mixed = good[name].clone(), good[name].clone(), {**good, name: good[name][:, :2].contiguous()}
    nan[0, 0], inf[-1, -1] = float("nan"), float("inf")
    return {
        "NaN": ({**good, name: nan}, "query.delta_u holds NaN or Inf"),
        "Inf": ({**good, name: inf}, "query.delta_u holds NaN or Inf"),
        "extra tensor": ({**good, "query.weight": torch.ones(2)}, "query.weight: this projector has no such deltas"),
        "missing tensor": ({n: t for n, t in good.items() if n != name}, "there is no query.delta_u"),
        "two ranks": (mixed, r"query.delta_u is \(64, 2\).*should be \(64, 4\)"),
        "higher rank": (other_deltas(model, rank=5), r"rank 5, more than this model's delta_rank=4"),
        "wrong width": ({**good, name: good[name][:-1].contiguous()}, r"is \(63, 4\).*should be \(64, 4\)"),
        "integers": ({**good, name: good[name].int()}, "of a float dtype"),
        "two names": ({**good, f"model.multi_modal_projector.{name}": good[name]}, "query.delta_u is given twice"),
    }


@pytest.mark.parametrize("case", bad_tensors(make()), ids=str)
def test_bad_tensors_change_nothing(released, tmp_path, case):
    tensors, message = bad_tensors(released)[case]
    before = snapshot(released)
    with pytest.raises(ValueError, match=message):
        released.load_delta_state_dict(tensors)
    assert_same(snapshot(released), before)
    write_repo(released, tmp_path / "bad", {name: tensor.clone() for name, tensor in tensors.items()}, delta_rank=4)
    with pytest.raises(ValueError, match=message) as error:
        released.load_deltas(tmp_path / "bad")
    assert "bad" in str(error.value)
    assert_same(snapshot(released), before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"delta_rank": 3}, "delta_rank=3 in its config, but its tensors have rank 4"),
        ({"projector_layout": "paper"}, "projector_layout='paper' of these deltas is not the model's, 'released'"),
        ({"delta_sharing": "all"}, "delta_sharing='all' of these deltas"),
        (
            {"base_sha256": {"bfloat16": "0" * 64}, "base_model_name_or_path": "org/b"},
            r"belong to another base \(org/b\) than",
        ),
        ({"base_sha256": None}, "delta_config.json has base_sha256=None"),
        ({"format_version": 2}, "format_version=2"),
    ],
)
def test_bad_settings_change_nothing(released, tmp_path, changes, message):
    write_repo(released, tmp_path / "bad", **changes)
    before = snapshot(released)
    with pytest.raises(ValueError, match=message):
        released.load_deltas(tmp_path / "bad")
    assert_same(snapshot(released), before)


@pytest.mark.parametrize(
    "file, contents, error, message",
    [
        ("delta_config.json", b"{", ValueError, "not valid JSON"),
        ("delta_config.json", b"[]", ValueError, "does not describe deltas"),
        ("delta_config.json", b'{"a":' * 100_000, ValueError, "not valid JSON"),
        ("delta_config.json", b" " * (2**20 + 1), ValueError, "has more than 1,048,576 bytes"),
        ("deltas.safetensors", b"no header", ValueError, "cannot be read"),
        ("deltas.safetensors", None, OSError, "deltas.safetensors"),
        ("delta_config.json", None, OSError, "delta_config.json"),
    ],
)
def test_broken_files_change_nothing(released, tmp_path, file, contents, error, message):
    released.save_deltas(tmp_path / "bad")
    path = tmp_path / "bad" / file
    path.unlink() if contents is None else path.write_bytes(contents)
    before = snapshot(released)
    with pytest.raises(error, match=message):
        released.load_deltas(tmp_path / "bad")
    assert_same(snapshot(released), before)


@pytest.mark.parametrize(
    "values",
    [
        *({"delta_rank": value} for value in (None, True, "4", -1, 0.5, 10**400, [4])),
        *({"projector_layout": value} for value in (None, 1, "other", [], {})),
        *({"delta_sharing": value} for value in (None, 1, "other", [])),
        *({"base_sha256": value} for value in (None, "x", [], {"bfloat16": 5})),
        *({"base_model_name_or_path": value} for value in (5, [], 500 * "x")),
    ],
)
def test_a_config_of_other_types_is_one_sentence(released, tmp_path, values):
    write_repo(released, tmp_path / "bad", **values)
    with pytest.raises(ValueError, match=f"delta_config.json has {next(iter(values))}=") as refused:
        read_delta_config(tmp_path / "bad")
    assert len(str(refused.value)) < 400


def test_a_folder_that_appears_meanwhile_is_not_replaced(released, tmp_path, monkeypatch):
    import safetensors.torch

    save_file = safetensors.torch.save_file

    def appear(*arguments, **options):
        save_file(*arguments, **options)
        (tmp_path / "deltas").mkdir()
        (tmp_path / "deltas" / "mine.txt").touch()

    monkeypatch.setattr(safetensors.torch, "save_file", appear)
    with pytest.raises(FileExistsError, match="deltas exists"):
        released.save_deltas(tmp_path / "deltas")
    assert [path.name for path in tmp_path.rglob("*")] == ["deltas", "mine.txt"]


def test_another_layout_or_base_is_refused_unless_forced(released, tmp_path):
    make(**LAYOUTS["paper"]).save_deltas(tmp_path / "paper")
    stranger = make(seed=1)
    stranger.save_deltas(tmp_path / "stranger")
    before = snapshot(released)
    for force in (False, True):
        with pytest.raises(ValueError, match="projector_layout='paper'"):
            released.load_deltas(tmp_path / "paper", force=force)
    with pytest.raises(ValueError, match="another base"):
        released.load_deltas(tmp_path / "stranger")
    assert_same(snapshot(released), before)
    released.load_deltas(tmp_path / "stranger", force=True)
    assert_same(released.delta_state_dict(), stranger.delta_state_dict())


def test_names(released, tmp_path):
    released.save_deltas(tmp_path / "b")
    released.load_deltas(tmp_path / "b")
    before = snapshot(released)
    for taken in ("b", "default"):
        with pytest.raises(ValueError, match=f"deltas named '{taken}' already"):
            released.load_deltas(tmp_path / "b", name=taken)
    for call in (released.set_deltas, released.delete_deltas, released.delta_state_dict):
        with pytest.raises(ValueError, match="no deltas named 'c'; there are 'default', 'b'"):
            call("c")
    with pytest.raises(ValueError, match="'b' are active"):
        released.delete_deltas("b")
    with pytest.raises(ValueError, match="deltas named 'b' already"):
        released.add_deltas("b")
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"rank={rank}: use 1 to delta_rank=4, or make room with resize_deltas"):
            released.add_deltas("c", rank)
    assert_same(snapshot(released), before)


def test_existing_folders_are_kept(released, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            released.save_deltas(tmp_path / "full", overwrite=overwrite)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    released.save_deltas(tmp_path / "deltas")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        released.save_deltas(tmp_path / "deltas")
    released.load_delta_state_dict(other_deltas(released))
    released.save_deltas(tmp_path / "deltas", overwrite=True)
    assert_same(load_file(tmp_path / "deltas" / "deltas.safetensors"), released.delta_state_dict())
    with torch.no_grad():
        next(released.delta_parameters())[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        released.save_deltas(tmp_path / "nan")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deltas", "full"]
