"""What engines and quantisers ask of the code, checked without them; tests/integration starts the engines themselves."""

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from tests.modeling.projector_cases import make_projector
from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel


def test_the_base_model_reports_the_weights_of_the_head_as_unexpected(tmp_path):
    """vLLM builds the base model, and drops the weights that it says it ignores."""
    DeltaLlavaForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert list(info["unexpected_keys"]) == ["lm_head.weight"] and not info["missing_keys"]


@pytest.mark.parametrize("layout", ["released", "paper"])
@pytest.mark.parametrize("scale_factor", [1, 2, 12])
@pytest.mark.parametrize("images", [1, 2])
def test_linear_maps_get_rows_that_lie_side_by_side(layout, scale_factor, images):
    """vLLM's linear maps on CPU refuse an input whose last axis is strided."""
    projector = make_projector(tiny_config(projector_layout=layout)).eval()
    strided = []
    for name, module in projector.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: strided.append(name) if inputs[0].stride(-1) != 1 else None
            )
    levels = [torch.randn(images, 144, 64) for _ in range(3)]
    with torch.no_grad():
        projector(levels[0], levels, scale_factor)
    assert not strided


@pytest.mark.parametrize("model_class", [DeltaLlavaForConditionalGeneration, DeltaLlavaModel])
def test_only_layers_of_the_language_model_are_converted_with_the_list_in_the_docs(model_class: type) -> None:
    listed = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    if model_class is DeltaLlavaModel:
        listed = [name.removeprefix("model.") for name in listed]
    with torch.device("meta"):
        model = model_class(tiny_config())
    kept = HfQuantizer.get_modules_to_not_convert(model, listed, model._keep_in_fp32_modules)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    converted = {name for name in linear if should_convert_module(name, kept)}
    assert converted == {name for name in linear if "language_model." in name}


def test_a_float16_model_is_float16_throughout(tmp_path) -> None:
    DeltaLlavaForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
