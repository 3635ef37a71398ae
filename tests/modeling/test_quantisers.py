"""What quantisers of transformers leave alone, asked of what they have in common; the real ones run in tests/integration."""

import pytest
import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel


@pytest.mark.parametrize("model_class", [DeltaLlavaForConditionalGeneration, DeltaLlavaModel])
@pytest.mark.parametrize("listed", [None, ["language_model.layers.0"], ["model.language_model.layers.0"]])
def test_only_layers_of_the_language_model_are_converted(model_class: type, listed: list[str] | None) -> None:
    config = tiny_config()
    config.quantization_config = {"quant_method": "any"}  # from_pretrained sets it before it makes a model
    with torch.device("meta"):
        model = model_class(config)
    kept = HfQuantizer.get_modules_to_not_convert(model, listed, model._keep_in_fp32_modules)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    converted = {name for name in linear if should_convert_module(name, kept)}
    expected = {name for name in linear if "language_model." in name and not name.startswith(tuple(listed or ()))}
    assert converted == expected and converted


@pytest.mark.parametrize("quantised", [False, True])
def test_what_is_kept_has_the_models_dtype(quantised: bool) -> None:
    config = tiny_config()
    if quantised:
        config.quantization_config = {"quant_method": "any"}
    model = DeltaLlavaForConditionalGeneration(config)
    assert model._get_dtype_plan(torch.float16) == {}
    assert bool(model._keep_in_fp32_modules) is quantised


def test_a_float16_model_is_float16_throughout(tmp_path) -> None:
    DeltaLlavaForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
