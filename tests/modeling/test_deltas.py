"""Deltas as things users hold: saved, loaded, swapped, merged, trained. After an error the model is as it was."""

import copy
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import prompt, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel
from transformers_delta_llava.modeling.delta_repo_delta_llava import read_delta_config


LAYOUTS = {
    "released": {},
    "paper": {"projector_layout": "paper"},
    "paper, one base": {"projector_layout": "paper", "delta_sharing": "all"},
}


def make(seed: int = 0, **overrides) -> DeltaLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    return DeltaLlavaForConditionalGeneration(tiny_config(delta_rank=4, **overrides)).eval()


@pytest.fixture(params=LAYOUTS, ids=str)
def model(request):
    return make(**LAYOUTS[request.param])


@pytest.fixture
def released():
    return make()


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": prompt([36])[None], "pixel_values": pixels}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**inputs()).logits


def other_deltas(model, scale: float = 0.3, rank: int | None = None) -> dict[str, torch.Tensor]:
    """Deltas unlike the model's own."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, tensor in model.delta_state_dict().items():
        shape = list(tensor.shape)
        if rank is not None:
            shape[-1 if name.endswith("delta_u") else -2] = rank
        found[name] = torch.randn(shape, generator=generator) * scale
    return found


def snapshot(model) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = {
        f"{name}/{key}": t.clone() for name in model.delta_names for key, t in model.delta_state_dict(name).items()
    }
    return state | held


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def is_delta(name: str) -> bool:
    return name.endswith((".delta_u", ".delta_v"))


def write_repo(model, folder, tensors=None, **config_changes) -> None:
    """A delta repo of `model` with other tensors or settings in it."""
    model.save_deltas(folder)
    if tensors is not None:
        save_file(tensors, folder / "deltas.safetensors")
    path = folder / "delta_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config_changes}))


def test_deltas_have_the_names_of_the_projector(model):
    state = model.delta_state_dict()
    full = {f"model.multi_modal_projector.{name}" for name in state}
    assert full == {name for name in model.state_dict() if is_delta(name)}
    assert sum(p.numel() for p in model.delta_parameters()) == sum(t.numel() for t in state.values())
    assert model.delta_names == ["default"]


def test_the_released_projector_at_7b_has_196608(tmp_path):
    from transformers_delta_llava import DeltaLlavaConfig

    with torch.device("meta"):
        model = DeltaLlavaModel(DeltaLlavaConfig())
    assert sum(p.numel() for p in model.delta_parameters()) == 196_608
    projector = sum(p.numel() for p in model.multi_modal_projector.parameters())
    assert 196_608 / projector < 0.02
    model.multi_modal_projector.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter)
    model.save_deltas(tmp_path / "deltas")
    assert sum(file.stat().st_size for file in (tmp_path / "deltas").iterdir()) <= 1_000_000


def test_state_dict_goes_into_another_model_and_under_any_prefix(model):
    deltas = other_deltas(model)
    model.load_delta_state_dict(deltas)
    twin = copy.deepcopy(model)
    twin.load_delta_state_dict({name: torch.zeros_like(t) for name, t in deltas.items()})
    assert not torch.equal(logits(twin), logits(model))
    twin.load_delta_state_dict({n: t for n, t in model.state_dict().items() if is_delta(n)})
    assert_same(twin.state_dict(), model.state_dict())


def test_save_and_load(model, tmp_path):
    before, plain = snapshot(model), logits(model)
    model.save_deltas(tmp_path / "own")
    assert sorted(file.name for file in (tmp_path / "own").iterdir()) == [
        "README.md",
        "delta_config.json",
        "deltas.safetensors",
    ]
    model.load_delta_state_dict(other_deltas(model))
    changed = logits(model)
    model.save_deltas(tmp_path / "other")

    twin = make(projector_layout=model.config.projector_layout, delta_sharing=model.config.delta_sharing)
    assert twin.load_deltas(tmp_path / "other") == "other"
    assert (twin.delta_names, twin.active_deltas) == (["default", "other"], "other")
    assert torch.equal(logits(twin), changed)
    assert_same(twin.delta_state_dict(), model.delta_state_dict())
    twin.load_deltas(tmp_path / "own", name="mine", activate=False)
    assert torch.equal(logits(twin), changed)
    twin.set_deltas("mine")
    assert torch.equal(logits(twin), plain)
    twin.set_deltas("default")
    twin.delete_deltas("mine")
    twin.delete_deltas("other")
    assert_same(snapshot(twin), before)


def test_base_model_reads_what_the_whole_model_wrote(released, tmp_path):
    released.load_delta_state_dict(other_deltas(released))
    released.save_deltas(tmp_path / "deltas")
    base = make().model
    base.load_deltas(tmp_path / "deltas")
    with torch.no_grad():
        assert torch.equal(base(**inputs()).last_hidden_state, released.model(**inputs()).last_hidden_state)


def test_loading_reads_the_repo_alone_and_hashes_each_base_once(released, tmp_path, monkeypatch):
    released.save_deltas(tmp_path / "deltas")
    opened, hashed = [], []
    monkeypatch.setattr("safetensors.safe_open", lambda *a, **k: opened.append(str(a[0])) or safe_open(*a, **k))
    repo_module = "transformers_delta_llava.modeling.delta_repo_delta_llava.hash_base"
    import transformers_delta_llava.modeling.delta_repo_delta_llava as delta_repo

    hash_base = delta_repo.hash_base
    monkeypatch.setattr(repo_module, lambda weights, dtype: hashed.append(list(weights)) or hash_base(weights, dtype))
    released.load_deltas(tmp_path / "deltas")
    assert [path.rpartition("/")[2] for path in opened] == ["deltas.safetensors"]
    assert hashed == [["q_proj", "k_proj", "v_proj"]]


def test_a_hundred_swaps_leave_the_base_to_the_bit(model, tmp_path):
    before, plain = snapshot(model), logits(model)
    write_repo(model, tmp_path / "b", other_deltas(model))
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    model.load_deltas(tmp_path / "b")
    changed = logits(model)
    for name in ["default", "b"] * 50:
        model.set_deltas(name)
    assert model.active_deltas == "b" and torch.equal(logits(model), changed)
    model.set_deltas("default")
    assert torch.equal(logits(model), plain)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    model.delete_deltas("b")
    assert_same(snapshot(model), before)


def test_added_deltas_change_nothing_until_they_are_trained(model):
    before, plain = snapshot(model), logits(model)
    with model.disable_deltas():
        base = logits(model)
    model.add_deltas("new", rank=2, activate=False)
    assert torch.equal(logits(model), plain)
    model.set_deltas("new")
    assert (model.delta_names, model.active_deltas) == (["default", "new"], "new")
    torch.testing.assert_close(logits(model), base)
    for name, tensor in model.delta_state_dict().items():
        assert tensor.any() == name.endswith("delta_u") and 2 in tensor.shape[-2:]
    model.add_deltas("full")
    model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    assert any(p.grad.any() for p in model.delta_parameters())
    model.set_deltas("default")
    for name in ("new", "full"):
        model.delete_deltas(name)
    assert_same(snapshot(model), before)


def test_disabled_deltas_leave_the_base(model):
    plain = logits(model)
    twin = copy.deepcopy(model)
    twin.load_delta_state_dict({name: torch.zeros_like(t) for name, t in twin.delta_state_dict().items()})
    base = logits(twin)
    with pytest.raises(KeyError), model.disable_deltas():
        torch.testing.assert_close(logits(model), base)
        with model.disable_deltas():
            pass
        torch.testing.assert_close(logits(model), base)  # the inner block does not enable what the outer disables
        raise KeyError
    assert torch.equal(logits(model), plain)
    model.merge_deltas()
    merged = logits(model)
    with model.disable_deltas():
        torch.testing.assert_close(logits(model), base)
    assert torch.equal(logits(model), merged)


def test_what_was_trained_is_kept_over_a_swap(released, tmp_path):
    released.save_deltas(tmp_path / "b")
    released.load_deltas(tmp_path / "b")
    with torch.no_grad():
        next(released.delta_parameters()).add_(1)
    trained = logits(released)
    released.set_deltas("default")
    assert not torch.equal(logits(released), trained)
    released.set_deltas("b")
    assert torch.equal(logits(released), trained)


def test_sets_of_lower_rank_fill_their_part_and_train_in_it(model, tmp_path):
    low = other_deltas(model, rank=2)
    write_repo(model, tmp_path / "low", low, delta_rank=2)
    full = snapshot(model)
    model.load_deltas(tmp_path / "low")
    assert_same(model.delta_state_dict(), low)
    padded = {n: torch.cat([t, torch.zeros_like(t)], -1 if n.endswith("u") else -2) for n, t in low.items()}
    twin = copy.deepcopy(model)
    twin.load_delta_state_dict(padded)
    assert torch.equal(logits(model), logits(twin))

    model.set_deltas_trainable()
    optimizer = torch.optim.AdamW(model.delta_parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
        optimizer.step()
    state = model.delta_state_dict()
    for name, parameter in model.state_dict().items():
        if is_delta(name):
            short = name.removeprefix("model.multi_modal_projector.")
            rest = parameter[..., 2:] if name.endswith("u") else parameter[..., 2:, :]
            assert not rest.any() and not torch.equal(state[short], low[short])
    model.save_deltas(tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / "delta_config.json").read_text())["delta_rank"] == 2
    model.set_deltas("default")
    model.delete_deltas("low")
    assert_same(snapshot(model), full)


def test_resize_makes_room_for_a_higher_rank(model, tmp_path):
    high = other_deltas(model, rank=6)
    write_repo(model, tmp_path / "high", high, delta_rank=6)
    before, plain = snapshot(model), logits(model)
    with pytest.raises(ValueError, match=r"rank 6, more than this model's delta_rank=4; call resize_deltas\(6\)"):
        model.load_deltas(tmp_path / "high")
    assert_same(snapshot(model), before)
    model.resize_deltas(6)
    assert torch.allclose(logits(model), plain, atol=1e-6)
    model.load_deltas(tmp_path / "high")
    assert_same(model.delta_state_dict(), high)
    with pytest.raises(ValueError, match="delta_rank=4: the deltas 'high' have rank 6"):
        model.resize_deltas(4)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    again = DeltaLlavaForConditionalGeneration.from_pretrained(saved)
    assert again.config.delta_rank == 6 and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_sum_in_float32_and_unmerge_exact(model, dtype):
    model.to(dtype)
    before, plain = snapshot(model), logits_in(model, dtype)
    model.merge_deltas()
    merged = logits_in(model, dtype)
    assert not torch.equal(merged, plain)  # other roundings: the sums are in use
    torch.testing.assert_close(merged, plain, atol=2e-6 if dtype == torch.float32 else 0.05, rtol=0.02)
    assert_same(snapshot(model), before)
    model.unmerge_deltas()
    assert torch.equal(logits_in(model, dtype), plain)
    assert_same(snapshot(model), before)


@torch.no_grad()
def logits_in(model, dtype):
    batch = inputs()
    return model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"].to(dtype)).logits


def test_merged_values(released):
    q_proj = released.model.multi_modal_projector.q_proj
    expected = q_proj.weight + (q_proj.delta_u @ q_proj.delta_v).T
    torch.testing.assert_close(q_proj.weight + q_proj.get_delta_weight(), expected)
    released.merge_deltas()
    torch.testing.assert_close(q_proj.merged_weights[0], expected)


def test_merged_model_saves_unmerged(model, tmp_path):
    model.save_deltas(tmp_path / "before")
    plain, state = logits(model), model.state_dict()
    model.merge_deltas()
    assert_same(model.state_dict(), state)
    model.save_pretrained(tmp_path / "merged")
    model.save_deltas(tmp_path / "deltas")
    for name in ("deltas.safetensors", "delta_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "deltas" / name).read_bytes()
    again = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), plain)
    again.load_deltas(tmp_path / "deltas")
    assert torch.equal(logits(again), plain)


def test_what_unmerges(released, tmp_path):
    released.save_deltas(tmp_path / "b")
    released.load_deltas(tmp_path / "b", activate=False)
    plain = logits(released)
    with pytest.warns(UserWarning, match="nothing to do"):
        released.unmerge_deltas()
    released.merge_deltas()
    with pytest.warns(UserWarning, match="merged already, nothing to do"):
        released.merge_deltas()
    with pytest.raises(ValueError, match="call unmerge_deltas"):
        released.load_delta_state_dict(released.delta_state_dict())
    projection = released.model.multi_modal_projector.q_proj
    with pytest.warns(UserWarning, match="unmerged for this"):
        released.set_deltas("b")
    assert not projection.is_merged
    released.merge_deltas()
    with pytest.warns(UserWarning, match="cannot be trained"):
        released.train()
    assert not projection.is_merged
    released.eval().merge_deltas()
    with pytest.warns(UserWarning, match="unmerged for this"):
        released.set_deltas_trainable()
    assert not projection.is_merged
    released.merge_deltas()
    released.load_state_dict(released.state_dict())
    assert not projection.is_merged and torch.equal(logits(released), plain)


def test_merge_refuses_what_is_not_finite(released):
    released.to(torch.float16)
    deltas = {name: tensor.clone() for name, tensor in released.delta_state_dict().items()}
    for factor in ("delta_u", "delta_v"):
        deltas[f"v_proj.{factor}"].fill_(300)  # the factors fit into float16, their product does not
    released.load_delta_state_dict(deltas)
    before = snapshot(released)
    with pytest.raises(ValueError, match="v_proj: base and deltas add up to NaN or Inf"):
        released.merge_deltas()
    assert not any(p.is_merged for p in released._delta_projections().values())
    assert_same(snapshot(released), before)
    released.merge_deltas(safe_merge=False)
    assert released.model.multi_modal_projector.v_proj.is_merged


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
    name = "q_proj.delta_u"
    nan, inf, mixed = good[name].clone(), good[name].clone(), {**good, name: good[name][:, :2].contiguous()}
    nan[0, 0], inf[-1, -1] = float("nan"), float("inf")
    return {
        "NaN": ({**good, name: nan}, "q_proj.delta_u holds NaN or Inf"),
        "Inf": ({**good, name: inf}, "q_proj.delta_u holds NaN or Inf"),
        "extra tensor": ({**good, "q_proj.weight": torch.ones(2)}, "q_proj.weight: this projector has no such deltas"),
        "missing tensor": ({n: t for n, t in good.items() if n != name}, "there is no q_proj.delta_u"),
        "two ranks": (mixed, r"q_proj.delta_u is \(64, 2\).*should be \(64, 4\)"),
        "higher rank": (other_deltas(model, rank=5), r"rank 5, more than this model's delta_rank=4"),
        "wrong width": ({**good, name: good[name][:-1].contiguous()}, r"is \(63, 4\).*should be \(64, 4\)"),
        "integers": ({**good, name: good[name].int()}, "of a float dtype"),
        "two names": ({**good, f"model.multi_modal_projector.{name}": good[name]}, "q_proj.delta_u is given twice"),
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


def test_a_model_without_deltas_says_so(tmp_path):
    model = make(use_delta_projection=False)
    calls = [
        lambda: list(model.delta_parameters()),
        model.delta_state_dict,
        lambda: model.load_delta_state_dict({}),
        lambda: model.save_deltas(tmp_path / "x"),
        lambda: model.load_deltas(tmp_path),
        lambda: model.set_deltas("default"),
        model.merge_deltas,
        model.unmerge_deltas,
        model.set_deltas_trainable,
        lambda: model.resize_deltas(8),
        lambda: model.add_deltas("x"),
        lambda: model.disable_deltas().__enter__(),
        lambda: model.push_deltas_to_hub("someone/x"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in calls:
            with pytest.raises(ValueError, match="use_delta_projection=False: this model has no deltas"):
                call()


class Shapes(TorchDispatchMode):
    """Shapes of everything that is computed, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.seen.add(tuple(result.shape))
        return result


def test_training_deltas_is_low_rank_in_both_directions(released):
    projector = released.model.multi_modal_projector
    k_proj = projector.k_proj
    bases = {tuple(k_proj.weight.shape), tuple(k_proj.weight.shape)[::-1]}
    features = [torch.randn(2, 144, 64) for _ in range(3)]

    def shapes_of_a_step() -> set:
        with Shapes() as mode:
            projector(features[0], features).square().mean().backward()
        return mode.seen

    assert shapes_of_a_step() & bases  # trained whole, the gradient of the base has its shape
    released.zero_grad()
    released.set_deltas_trainable()
    assert not shapes_of_a_step() & bases
    assert {n for n, p in released.named_parameters() if p.grad is not None} == {
        n for n, _ in released.named_parameters() if is_delta(n)
    }


def test_optimizer_state_is_the_deltas_alone(model):
    model.set_deltas_trainable()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if is_delta(n)
    }
    before = snapshot(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    model.train()
    model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    optimizer.step()
    deltas = sum(p.numel() for p in model.delta_parameters())
    moments = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    assert moments == 2 * deltas
    after = model.state_dict()
    assert all(torch.equal(tensor, before[name]) != is_delta(name) for name, tensor in after.items())


def test_compiled_graph_survives_swaps(released, tmp_path):
    from torch._dynamo.testing import CompileCounter

    write_repo(released, tmp_path / "b", other_deltas(released))
    released.load_deltas(tmp_path / "b", activate=False)
    features = [torch.randn(1, 144, 64) for _ in range(3)]
    projector = released.model.multi_modal_projector
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(projector, fullgraph=True, backend=counter)
    with torch.no_grad():
        results = []
        for name in ("default", "b", "default"):
            released.set_deltas(name)
            results.append(compiled(features[0], features))
            assert torch.equal(results[-1], projector(features[0], features))
        assert counter.frame_count == 1
        released.merge_deltas()
        torch.testing.assert_close(compiled(features[0], features), results[0])
        released.unmerge_deltas()
        assert torch.equal(compiled(features[0], features), results[0])
    torch.compile(released).set_deltas("b")  # the verbs reach through the wrapper
    assert released.active_deltas == "b"
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
