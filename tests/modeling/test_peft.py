"""PEFT's own configs, as they are written for every other model."""

import copy
import re

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.tiny import IMAGE_TOKEN_ID, TEXT, VISION, prompt, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel


COMMON = ["q_proj", "v_proj"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(tiny_config()).eval()


def adapted(model: torch.nn.Module) -> set[str]:
    """Names of the modules that have an adapter."""
    names = (
        re.search(r"base_model\.model\.(.*)\.(lora_A|hada_w1_a|ia3_l)\.", f"{name}.")
        for name, _ in model.named_parameters()
    )
    return {match[1] for match in names if match}


def make_inputs() -> dict[str, torch.Tensor]:
    ids = prompt([36])[None]
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.ones(1, 3, 24, 24)}


@pytest.mark.parametrize("targets", [COMMON, r".*\.(q_proj|v_proj)", "all-linear", ["fc1", "fc2"]], ids=str)
def test_targets_of_lora_are_those_in_llava_and_linear_maps_of_the_projector(model, targets):
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config={**VISION, "patch_size": 4}, text_config=TEXT, image_token_index=IMAGE_TOKEN_ID)
    )
    config = LoraConfig(target_modules=targets, r=2)
    adapters = adapted(get_peft_model(model, copy.deepcopy(config)))
    expected = {name for name in adapted(get_peft_model(llava, config)) if "projector" not in name}
    assert {name for name in adapters if "projector" not in name} == expected
    for name in adapters - expected:
        assert type(model.get_submodule(name).get_base_layer()) is torch.nn.Linear


@pytest.mark.parametrize(
    "config",
    [LoHaConfig(target_modules=COMMON), IA3Config(target_modules=COMMON, feedforward_modules=[])],
    ids=lambda config: type(config).__name__,
)
def test_other_methods_of_peft(model, config):
    adapters = adapted(get_peft_model(model, config))
    assert adapters and not any(re.search(r"projector\.(query|key|value)", name) for name in adapters)


def test_the_base_model_without_a_head():
    assert adapted(get_peft_model(DeltaLlavaModel(tiny_config()), LoraConfig(target_modules=COMMON)))


@pytest.mark.parametrize("whole", [None, ["multi_modal_projector"]], ids=["LoRA", "LoRA and projector"])
def test_an_adapter_is_trained_saved_loaded_and_merged(model, whole, tmp_path):
    base, inputs = copy.deepcopy(model), make_inputs()
    peft = get_peft_model(model, LoraConfig(target_modules=COMMON, modules_to_save=whole, init_lora_weights=False))
    trainable = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trainable)
    assert any("delta_u" in name for name in trainable) is (whole is not None)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    peft(**inputs).loss.backward()
    optimizer.step()
    peft.save_pretrained(tmp_path)

    with torch.no_grad():
        expected = peft(**inputs).logits
        assert not torch.allclose(base(**inputs).logits, expected, atol=1e-3)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=0)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert set(merged.state_dict()) == set(DeltaLlavaForConditionalGeneration(tiny_config()).state_dict())
