"""Deltas are saved, loaded, swapped, merged and trained. After an error the model is as it was."""

import copy
import json
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.modeling.delta_cases import (
    assert_same,
    inputs,
    is_delta,
    logits,
    make,
    other_deltas,
    snapshot,
    write_repo,
)
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel


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
    query = released.model.multi_modal_projector.query
    expected = query.weight + (query.delta_u @ query.delta_v).T
    torch.testing.assert_close(query.weight + query.get_delta_weight(), expected)
    released.merge_deltas()
    torch.testing.assert_close(query.merged_weights[0], expected)


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
    projection = released.model.multi_modal_projector.query
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
        deltas[f"value.{factor}"].fill_(300)  # the factors fit into float16, their product does not
    released.load_delta_state_dict(deltas)
    before = snapshot(released)
    with pytest.raises(ValueError, match="value: base and deltas add up to NaN or Inf"):
        released.merge_deltas()
    assert not any(p.is_merged for p in released._delta_projections().values())
    assert_same(snapshot(released), before)
    released.merge_deltas(safe_merge=False)
    assert released.model.multi_modal_projector.value.is_merged


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
    key = projector.key
    bases = {tuple(key.weight.shape), tuple(key.weight.shape)[::-1]}
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
