"""The modules that are traced, compared with the model: every kind of mask, cache and tower. Tracing itself is tested once, on the exports."""

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.onnx.files import WeightFiles
from transformers_delta_llava.onnx.graphs import (
    Decoder,
    VisionEncoder,
    grouped_attention,
    use_grouped_attention,
)
from transformers_delta_llava.onnx.settings import LANGUAGE_MODELS


WINDOWS = {
    "mistral": {"sliding_window": 5},
    "phi3": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
@torch.no_grad()
def test_decoder_of_every_language_model(model_type):
    """A padded prompt in two parts, then single tokens, compared with one pass of the model."""
    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration(
        tiny_config(text={"model_type": model_type, **WINDOWS.get(model_type, {})})
    ).eval()
    embeds = torch.randn(2, 12, model.config.text_config.hidden_size)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    heads, size = model.config.text_config.num_key_value_heads, model.config.text_config.head_dim
    cache = [torch.zeros(2, heads, 0, size)] * (2 * model.config.text_config.num_hidden_layers)
    with use_grouped_attention(model):
        for start, stop in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 12)):
            part = slice(start, stop)
            logits, *cache = Decoder(model)(embeds[:, part], mask[:, :stop], positions[:, part], cache)
            assert logits.shape[1] == 1 and cache[0].shape[2] == stop
            torch.testing.assert_close(logits[:, 0], expected[:, stop - 1])
    assert model.model.language_model.config._attn_implementation != "delta_llava_onnx"


def test_grouped_attention_has_a_softcap():
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    mask = torch.zeros(1, 1, 3, 3)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.5
    expected = (2 * torch.tanh(scores / 2)).softmax(-1) @ key.repeat_interleave(2, 1)
    attended, _ = grouped_attention(torch.nn.Identity(), query, key, key, mask, 0.5, softcap=2.0)
    torch.testing.assert_close(attended, expected.transpose(1, 2))


@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model", "dinov2"])
@pytest.mark.parametrize("text", ["llama", "gemma"])  # Gemma multiplies embeddings, visual tokens among them
@torch.no_grad()
def test_vision_encoder_of_every_tower(vision, text):
    torch.manual_seed(0)
    strategy = "full" if vision == "siglip_vision_model" else "default"
    config = tiny_config(
        vision={"model_type": vision}, text={"model_type": text}, vision_feature_select_strategy=strategy
    )
    model = DeltaLlavaForConditionalGeneration(config).eval()
    pixels = torch.randn(2, 3, 24, 24)
    for number in (36, 4):
        expected = torch.stack(list(model.get_image_features(pixels, number).pooler_output))
        torch.testing.assert_close(VisionEncoder(model, number)(pixels), expected)
    model.merge_deltas()
    torch.testing.assert_close(VisionEncoder(model, 4)(pixels), expected)


def test_weights_go_into_several_files(tmp_path):
    """Equal tensors once, and no file larger than is allowed."""
    tables = [torch.full((64, 16), float(value)) for value in (1, 2, 3, 1)]
    initializers = [ir.tensor(table.numpy(), name=f"table{index}") for index, table in enumerate(tables)]
    values = [
        ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        for tensor in initializers
    ]
    node = ir.Node(
        "",
        "Sum",
        values,
        outputs=[ir.Value(name="total", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([64, 16]))],
    )
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}, name="sum")
    weights = WeightFiles(tmp_path, "sum.onnx", max_bytes=13_000)
    weights.save(ir.Model(graph, ir_version=10), "sum.onnx")
    assert weights.files == ["sum.onnx_data", "sum.onnx_data_1"]
    assert [(tmp_path / name).stat().st_size for name in weights.files] == [2 * 4096, 4096]
    (total,) = onnxruntime.InferenceSession(tmp_path / "sum.onnx").run(None, {})
    assert (total == 7).all()
