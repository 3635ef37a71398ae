"""Deltas beside PEFT, a quantised language model, and accelerate's offloading; and from the Hub."""

import pytest
import torch
from huggingface_hub import constants

from tests.hub_server import TOKEN, HubServer
from tests.modeling.delta_cases import assert_same, inputs, is_delta, logits, make, other_deltas, snapshot, write_repo


def test_lora_on_the_language_model_and_deltas_side_by_side(tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    assert not any(p.requires_grad for p in wrapped.delta_parameters())
    wrapped.set_deltas_trainable(freeze_others=False)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert all(is_delta(name) or ".lora_" in name for name in trained) and len(trained) == 6 + 8
    optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=0.01)
    loss = wrapped(**inputs(), labels=inputs()["input_ids"]).loss
    loss.backward()
    optimizer.step()
    after = {name.removeprefix("base_model.model."): t for name, t in wrapped.state_dict().items()}
    after = {name.replace(".base_layer.", "."): t for name, t in after.items() if ".lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) != is_delta(name) for name in before)

    wrapped.save_deltas(tmp_path / "deltas")
    wrapped.save_pretrained(tmp_path / "lora")
    expected = logits(wrapped.eval())
    fresh = make()
    fresh.load_deltas(tmp_path / "deltas")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "lora")
    assert torch.equal(logits(again), expected)


def test_deltas_of_the_copy_that_peft_trains(tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    settings = {"target_modules": r".*language_model.*\.q_proj", "modules_to_save": ["multi_modal_projector"]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    plain = logits(wrapped)
    wrapped.load_delta_state_dict(other_deltas(wrapped))
    changed = logits(wrapped)
    assert not torch.equal(changed, plain)
    wrapped.save_deltas(tmp_path / "deltas")
    other = make()
    other.load_deltas(tmp_path / "deltas")
    torch.testing.assert_close(logits(other), changed)


@pytest.mark.filterwarnings("ignore:torch")
def test_quantised_language_model(tmp_path):
    model = make()
    write_repo(model, tmp_path / "b", other_deltas(model))
    model.model.language_model = torch.ao.quantization.quantize_dynamic(model.model.language_model, {torch.nn.Linear})
    assert not any(type(module) is torch.nn.Linear for module in model.model.language_model.modules())
    plain = logits(model)
    model.load_deltas(tmp_path / "b")
    changed = logits(model)
    assert not torch.equal(changed, plain)
    model.merge_deltas()
    torch.testing.assert_close(logits(model), changed, atol=0.02, rtol=0.1)
    model.unmerge_deltas()
    assert torch.equal(logits(model), changed)
    model.set_deltas("default")
    assert torch.equal(logits(model), plain)


def test_device_map(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "repo")
    write_repo(model, tmp_path / "b", other_deltas(model))
    mapped = type(model).from_pretrained(tmp_path / "repo", device_map={"": "cpu"})
    mapped.load_deltas(tmp_path / "b")
    model.load_deltas(tmp_path / "b")
    assert torch.equal(logits(mapped), logits(model))


def test_offloaded_to_the_cpu(tmp_path):
    from accelerate import cpu_offload

    model, twin = make(), make()
    write_repo(model, tmp_path / "b", other_deltas(model))
    cpu_offload(model, execution_device="cpu")
    assert all(parameter.device.type == "meta" for parameter in model.delta_parameters())
    plain = logits(twin)
    for one in (model, twin):
        one.load_deltas(tmp_path / "b")
    changed = logits(twin)
    assert torch.equal(logits(model), changed)
    assert_same(model.delta_state_dict(), twin.delta_state_dict())
    model.merge_deltas()
    torch.testing.assert_close(logits(model), changed)
    model.unmerge_deltas()
    model.set_deltas("default")
    assert torch.equal(logits(model), plain)
    model.save_deltas(tmp_path / "saved")
    twin.set_deltas("default")
    twin.save_deltas(tmp_path / "twin")
    for name in ("deltas.safetensors", "delta_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "twin" / name).read_bytes()
    with pytest.raises(ValueError, match="offloaded, so its deltas cannot be resized"):
        model.resize_deltas(8)


def test_offloaded_to_disk_can_be_saved_and_merged_but_not_swapped(tmp_path):
    from accelerate import disk_offload

    model, twin = make(), make()
    twin.save_deltas(tmp_path / "twin")
    before, plain = snapshot(twin), logits(twin)
    disk_offload(model, str(tmp_path / "offload"), execution_device="cpu")
    model.save_deltas(tmp_path / "saved")
    for name in ("deltas.safetensors", "delta_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "twin" / name).read_bytes()
    model.load_deltas(tmp_path / "saved", activate=False)
    calls = [lambda: model.set_deltas("saved"), lambda: model.load_delta_state_dict(twin.delta_state_dict())]
    for call in [*calls, lambda: model.load_deltas(tmp_path / "saved", name="again")]:
        with pytest.raises(ValueError, match="offloaded to disk, where deltas cannot be changed"):
            call()
    assert model.delta_names == ["default", "saved"]
    model.merge_deltas()
    torch.testing.assert_close(logits(model), plain)
    model.unmerge_deltas()
    assert torch.equal(logits(model), plain)
    assert_same(
        {f"default/{n}": t for n, t in model.delta_state_dict().items()},
        {n: t for n, t in before.items() if n.startswith("default/")},
    )


def test_weights_on_the_meta_device_are_named(tmp_path):
    make().save_deltas(tmp_path / "deltas")
    with torch.device("meta"):
        model = make()
    with pytest.raises(ValueError, match="load the model's weights before its deltas"):
        model.load_deltas(tmp_path / "deltas")


def test_from_the_hub_and_back(hub_client, tmp_path, monkeypatch):
    source, model = make(), make()
    write_repo(source, tmp_path / "deltas", other_deltas(source))
    cache = {"cache_dir": tmp_path / "cache", "token": TOKEN}
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        url_template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url_template)
        server.repos["someone/deltas"] = tmp_path / "deltas"
        for options in ({"model_id": "someone/nothing"}, {"model_id": "someone/deltas", "revision": "nowhere"}):
            with pytest.raises(OSError, match=list(options.values())[-1]):
                model.load_deltas(**options, **cache)
        assert model.load_deltas("someone/deltas", **cache) == "deltas"
        assert_same(model.delta_state_dict(), other_deltas(source))
    assert model.delta_names == ["default", "deltas"]
