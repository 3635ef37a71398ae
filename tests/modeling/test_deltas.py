"""Deltas are saved, loaded, swapped, merged and trained. After an error the model is as it was."""

import copy
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
    write,
)
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaModel
from transformers_delta_llava.modeling.deltas_delta_llava import read_deltas


def test_deltas_have_the_names_of_the_projector(model):
    state = model.delta_state_dict()
    full = {f"model.multi_modal_projector.{name}" for name in state}
    assert full == {name for name in model.state_dict() if is_delta(name)}
    assert (model.delta_names, model.active_deltas) == (["default"], "default")


def test_the_released_projector_at_7b_has_196608():
    with torch.device("meta"):
        model = DeltaLlavaModel(DeltaLlavaConfig())
    assert sum(tensor.numel() for tensor in model.delta_state_dict().values()) == 196_608


def test_save_and_load(model, tmp_path):
    before, plain = snapshot(model), logits(model)
    model.save_deltas(tmp_path / "own")
    assert sorted(file.name for file in (tmp_path / "own").iterdir()) == ["README.md", "deltas.safetensors"]
    write(model, tmp_path / "other", other_deltas(model))
    assert model.load_deltas(tmp_path / "other") == model.active_deltas == "other"
    changed = logits(model)
    assert not torch.equal(changed, plain)
    model.load_deltas(tmp_path / "own", name="mine", activate=False)
    assert torch.equal(logits(model), changed)
    for name in ("mine", "default"):
        model.set_deltas(name)
        assert torch.equal(logits(model), plain)
    assert_same({n: t for n, t in snapshot(model).items() if n in before}, before)

    base = make(projector_layout=model.config.projector_layout).model  # the base model reads what the whole one wrote
    base.load_deltas(tmp_path / "other")
    model.set_deltas("other")
    with torch.no_grad():
        assert torch.equal(base(**inputs()).last_hidden_state, model.model(**inputs()).last_hidden_state)


def test_saving_again_replaces_the_file_in_one_step_and_keeps_the_card(released, tmp_path, monkeypatch):
    released.save_deltas(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = (tmp_path / "deltas.safetensors").read_bytes()
    write(released, tmp_path / "b", other_deltas(released))
    released.load_deltas(tmp_path / "b")

    def killed(*arguments, **options):
        arguments[1].write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transformers_delta_llava.modeling.deltas_delta_llava.save_file", killed)
        released.save_deltas(tmp_path)
    assert (tmp_path / "deltas.safetensors").read_bytes() == before
    released.save_deltas(tmp_path, dtype=torch.bfloat16)
    tensors, metadata = read_deltas(tmp_path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "deltas.safetensors").stat().st_mode & 0o777 == (tmp_path / "README.md").stat().st_mode & 0o777
    with torch.no_grad():
        released.model.multi_modal_projector.query.delta_u[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"query\.delta_u .* NaN"):
        released.save_deltas(tmp_path / "nan")
    assert not (tmp_path / "nan").exists()


def test_only_a_hub_id_is_written_as_the_base(released, tmp_path):
    released.save_pretrained(tmp_path / "model")
    loaded = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    loaded.save_deltas(tmp_path / "local")
    written = b"".join(file.read_bytes() for file in (tmp_path / "local").iterdir())
    assert str(tmp_path).encode() not in written and "base_model" not in read_deltas(tmp_path / "local")[1]
    loaded.config.name_or_path, loaded.config._commit_hash = "org/model", "abc"  # as loaded from the Hub
    loaded.save_deltas(tmp_path / "hub")
    assert read_deltas(tmp_path / "hub")[1]["base_model"] == "org/model"
    assert "base_model: org/model\n" in (tmp_path / "hub" / "README.md").read_text()


def test_a_base_is_recognised_in_float32_and_bfloat16_and_another_one_is_not(released, tmp_path):
    released.to(torch.bfloat16)
    stranger = make(seed=1)
    for saved in (torch.bfloat16, torch.float32):
        copy.deepcopy(released).to(saved).save_deltas(tmp_path / str(saved))
        for loaded in (torch.bfloat16, torch.float32):
            copy.deepcopy(released).to(loaded).load_deltas(tmp_path / str(saved))
            with pytest.raises(ValueError, match="another base"):
                copy.deepcopy(stranger).to(loaded).load_deltas(tmp_path / str(saved))
    stranger.load_deltas(tmp_path / "torch.float32", force=True)


def bad_deltas(model) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str], str]]:
    good = {name: tensor.clone() for name, tensor in model.delta_state_dict().items()}
    name = "query.delta_u"
    return {
        "too large": ({**good, name: good[name].double() * 1e300}, {}, r"query.delta_u .* NaN or Inf"),
        "extra": ({**good, "query.weight": torch.ones(2)}, {}, "query.weight"),
        "missing": ({n: t for n, t in good.items() if n != name}, {}, r"expected query\.delta_u"),
        "two ranks": ({**good, name: good[name][:, :2]}, {}, r"query.delta_v is \(4, 64\), expected \(2, 64\)"),
        "wrong width": ({**good, name: good[name][:-1]}, {}, r"query.delta_u is \(63, 4\), expected \(64, 4\)"),
        "another layout": (good, {"projector_layout": "paper"}, "projector_layout='paper'.*'released'"),
        "another base": (good, {"base_sha256": "0", "base_model": "org/b"}, r"another base \(org/b\)"),
    }


@pytest.mark.parametrize("case", bad_deltas(make()))
def test_deltas_that_do_not_fit_change_nothing(released, tmp_path, case):
    tensors, metadata, message = bad_deltas(released)[case]
    write(released, tmp_path / "bad", tensors, **metadata)
    before = snapshot(released)
    with pytest.raises(ValueError, match=message):
        released.load_deltas(tmp_path / "bad", force=case not in ("another base",))
    assert_same(snapshot(released), before)


def test_names(released, tmp_path):
    released.save_deltas(tmp_path / "b")
    released.load_deltas(tmp_path / "b")
    for call in (lambda: released.load_deltas(tmp_path / "b"), lambda: released.add_deltas("default")):
        with pytest.raises(ValueError, match="already"):
            call()
    for call in (released.set_deltas, released.delta_state_dict):
        with pytest.raises(ValueError, match="'c'.* b, default"):
            call("c")
    with pytest.raises(ValueError, match="rank"):
        released.add_deltas("c", rank=0)
    with pytest.raises(OSError, match="nowhere"):
        released.load_deltas(tmp_path / "nowhere")
    assert released.delta_names == ["b", "default"]


def test_a_set_has_the_rank_it_has(model, tmp_path):
    plain = logits(model)
    for rank in (2, 6):
        write(model, tmp_path / str(rank), other_deltas(model, rank))
        model.load_deltas(tmp_path / str(rank))
        assert model.config.delta_rank == rank
        assert_same(model.delta_state_dict(), other_deltas(model, rank))
        model.save_pretrained(tmp_path / "saved")
        again = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
        assert torch.equal(logits(again), logits(model))
    model.set_deltas("default")
    assert model.config.delta_rank == 4 and torch.equal(logits(model), plain)


def test_added_deltas_change_nothing_until_they_are_trained(model):
    plain = logits(model)
    with model.disable_deltas():
        base = logits(model)
    model.add_deltas("new", rank=2, activate=False)
    assert torch.equal(logits(model), plain)
    model.set_deltas("new")
    torch.testing.assert_close(logits(model), base)
    for name, tensor in model.delta_state_dict().items():
        assert tensor.any() == name.endswith("delta_u") and 2 in tensor.shape[-2:]


def test_an_optimizer_keeps_the_set_it_was_made_for(released):
    released.add_deltas("new")
    released.set_deltas_trainable()
    optimizer = torch.optim.SGD((p for p in released.parameters() if p.requires_grad), lr=0.1)
    released.set_deltas("default")
    assert all(p.requires_grad == is_delta(name) for name, p in released.named_parameters())
    before = snapshot(released)
    released.set_deltas("new")
    released(**inputs(), labels=inputs()["input_ids"]).loss.backward()
    optimizer.step()
    released.set_deltas("default")
    after = snapshot(released)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in after if name.startswith("new/") and name.endswith("delta_v")
    }


def test_disabled_deltas_leave_the_base(model):
    plain = logits(model)
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if is_delta(name):
            torch.nn.init.zeros_(parameter)
    base = logits(twin)
    with pytest.raises(KeyError), model.disable_deltas():
        torch.testing.assert_close(logits(model), base)
        raise KeyError
    assert torch.equal(logits(model), plain)
    first, second = model.disable_deltas(), model.disable_deltas()  # blocks that overlap, as those of two threads
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch.testing.assert_close(logits(model), base)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), plain)
    model.merge_deltas()
    merged = logits(model)
    with model.disable_deltas():
        torch.testing.assert_close(logits(model), base)
    assert torch.equal(logits(model), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_sum_in_float32_and_unmerge_exact(model, dtype, tmp_path):
    model.to(dtype)
    before, plain = snapshot(model), logits(model)
    model.merge_deltas()
    merged = logits(model)
    assert not torch.equal(merged, plain)  # other roundings: the sums are in use
    torch.testing.assert_close(merged, plain, atol=2e-6 if dtype == torch.float32 else 0.05, rtol=0.02)
    projection = model.model.multi_modal_projector.key
    expected = projection.weight.float() + (projection.delta_u.float() @ projection.delta_v.float()).mT
    torch.testing.assert_close(projection.merged_weights, expected.reshape(-1, *projection.weight.shape).to(dtype))
    assert_same(snapshot(model), before)
    model.save_pretrained(tmp_path / "merged")
    again = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert_same(snapshot(again), before)
    model.unmerge_deltas()
    assert torch.equal(logits(model), plain)
    assert_same(snapshot(model), before)


def test_what_unmerges(released):
    plain = logits(released)
    with pytest.warns(UserWarning, match="nothing to do"):
        released.unmerge_deltas()
    released.add_deltas("b", activate=False)
    for step in (
        lambda: released.set_deltas("b"),
        lambda: released.set_deltas("default"),
        released.train,
        released.set_deltas_trainable,
    ):
        released.eval().merge_deltas()
        with pytest.warns(UserWarning, match="unmerged"):
            step()
        assert released.model.multi_modal_projector.query.merged_weights is None
    released.eval().merge_deltas()
    with pytest.warns(UserWarning, match="merged already"):
        released.merge_deltas()
    released.load_state_dict(released.state_dict())
    assert torch.equal(logits(released), plain)


def test_merge_refuses_what_is_not_finite(released):
    released.to(torch.float16)
    projection = released.model.multi_modal_projector.value
    with torch.no_grad():  # the factors fit into float16, their product does not
        projection.delta_u.fill_(300)
        projection.delta_v.fill_(300)
    before = snapshot(released)
    with pytest.raises(ValueError, match="value: .* NaN or Inf"):
        released.merge_deltas()
    assert projection.merged_weights is None
    assert_same(snapshot(released), before)


def test_a_model_without_deltas_refuses_every_method(tmp_path):
    model = make(use_delta_projection=False)
    make().save_deltas(tmp_path / "deltas")
    calls = [
        model.delta_state_dict,
        lambda: model.save_deltas(tmp_path / "x"),
        lambda: model.load_deltas(tmp_path / "deltas"),
        lambda: model.set_deltas("default"),
        model.merge_deltas,
        model.unmerge_deltas,
        model.set_deltas_trainable,
        lambda: model.add_deltas("x"),
        lambda: model.disable_deltas().__enter__(),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in calls:
            with pytest.raises(ValueError, match="use_delta_projection=False"):
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
    bases = {tuple(projector.key.weight.shape), tuple(projector.key.weight.shape)[::-1]}
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


def test_a_compiled_graph_survives_swaps(released):
    from torch._dynamo.testing import CompileCounter

    released.add_deltas("b", activate=False)
    features = [torch.randn(1, 144, 64) for _ in range(3)]
    projector = released.model.multi_modal_projector
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(projector, fullgraph=True, backend=counter)
    with torch.no_grad():
        for name in ("default", "b", "default"):
            released.set_deltas(name)
            assert torch.equal(compiled(features[0], features), projector(features[0], features))
        assert counter.frame_count == 1
        plain = projector(features[0], features)
        released.merge_deltas()
        torch.testing.assert_close(compiled(features[0], features), plain)
        released.unmerge_deltas()
        assert torch.equal(compiled(features[0], features), plain)
    torch.compile(released).set_deltas("b")  # the verbs reach through the wrapper
    assert released.active_deltas == "b"


class TestElsewhere:
    """With PEFT, a quantised language model, and accelerate's offloading."""

    def test_lora_on_the_language_model_and_deltas_side_by_side(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = make()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
        wrapped = peft.get_peft_model(model, lora)
        wrapped.set_deltas_trainable(freeze_others=False)
        trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
        assert all(is_delta(name) or ".lora_" in name for name in trained) and len(trained) == 6 + 8
        optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=0.01)
        wrapped(**inputs(), labels=inputs()["input_ids"]).loss.backward()
        optimizer.step()
        after = {name.removeprefix("base_model.model."): t for name, t in wrapped.state_dict().items()}
        after = {name.replace(".base_layer.", "."): t for name, t in after.items() if ".lora_" not in name}
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) != is_delta(name) for name in before)
        wrapped.save_deltas(tmp_path / "deltas")
        wrapped.save_pretrained(tmp_path / "lora")
        fresh = make()
        fresh.load_deltas(tmp_path / "deltas")
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "lora")
        assert torch.equal(logits(again), logits(wrapped.eval()))

    def test_deltas_of_the_copy_that_peft_trains(self, tmp_path):
        peft = pytest.importorskip("peft")
        settings = {"target_modules": r".*language_model.*\.q_proj", "modules_to_save": ["multi_modal_projector"]}
        wrapped = peft.get_peft_model(make(), peft.LoraConfig(r=2, **settings))
        plain = logits(wrapped)
        write(make(), tmp_path / "b", other_deltas(wrapped))
        wrapped.load_deltas(tmp_path / "b")
        assert not torch.equal(logits(wrapped), plain)
        other = make()
        other.load_deltas(tmp_path / "b")
        torch.testing.assert_close(logits(other), logits(wrapped))

    @pytest.mark.filterwarnings("ignore:torch")
    def test_quantised_language_model(self):
        model = make()
        model.model.language_model = torch.ao.quantization.quantize_dynamic(
            model.model.language_model, {torch.nn.Linear}
        )
        plain = logits(model)
        model.merge_deltas()
        torch.testing.assert_close(logits(model), plain, atol=0.02, rtol=0.1)

    def test_an_offloaded_projector_is_refused(self, tmp_path):
        from accelerate import cpu_offload

        model = make()
        model.save_deltas(tmp_path / "b")
        cpu_offload(model, execution_device="cpu")
        for call in (model.merge_deltas, lambda: model.load_deltas(tmp_path / "b"), lambda: model.add_deltas("c")):
            with pytest.raises(ValueError, match="offloaded.*device_map"):
                call()
        assert model.delta_names == ["default"]
