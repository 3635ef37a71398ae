"""`delta-llava serve` before the server starts; tests/integration asks the server itself."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.auto import modeling_auto
from transformers.utils.import_utils import is_serve_available

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, serving
from transformers_delta_llava.serving import transformers_serve


def test_other_options_go_to_transformers(call, monkeypatch):
    calls = []
    monkeypatch.setattr(serving, "serve", lambda *arguments: calls.append(arguments))
    assert call("serve", "org/model", "--port", "8001", "--num-visual-tokens", "4", "--compile")[0] == 0
    assert calls == [("org/model", ["--port", "8001", "--compile"], 4)]


@pytest.mark.skipif(is_serve_available(), reason="the server's dependencies are installed")
def test_missing_dependencies_are_named(call):
    code, _, err = call("serve", "org/model")
    assert code == 2 and "pip install 'transformers-delta-llava[serve]'" in err


def test_a_budget_that_the_model_does_not_have(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(transformers_serve, "is_serve_available", lambda: True)
    tiny_config().save_pretrained(tmp_path)
    names = dict(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    with pytest.raises(ValueError, match="num_visual_tokens=7: .* use one of 144, 36, 16, 9, 4, 1"):
        transformers_serve.serve(str(tmp_path), num_visual_tokens=7)
    assert dict(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) == names


@pytest.fixture
def limited():
    """A model and its processor as `delta-llava serve` hands them to the server."""
    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration(tiny_config(text={"max_position_embeddings": 250})).eval()
    load = transformers_serve._with_limits(lambda: (model, tiny_processor(model.config)))
    assert load()[0] is model
    return load()


def test_a_conversation_longer_than_the_positions_is_refused(limited):
    _, processor = limited
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with pytest.raises(ValueError, match="it has more than 250 tokens"):
        processor.apply_chat_template([{"role": "user", "content": "a" * 10**6}], **options)
    with pytest.raises(ValueError, match="it has 402 tokens, and the model has 250 positions"):
        processor.apply_chat_template([{"role": "user", "content": "a" * 240}], **options)
    turns = [{"role": "developer", "content": "be brief"}, *[{"role": "user", "content": "a"}] * 2]
    assert processor.apply_chat_template(turns, **options)["input_ids"].shape[1] < 250


def test_generation_ends_with_the_positions(limited):
    model, processor = limited
    ids = torch.full((1, 240), 5)
    config = GenerationConfig(max_new_tokens=10**6, do_sample=False)
    answer = model.generate(input_ids=ids, generation_config=config, tokenizer=processor)
    assert answer.shape[1] == 250 and config.max_new_tokens == 10
    with pytest.raises(ValueError, match="num_beams=1000: this server computes up to 16"):
        model.generate(input_ids=ids, generation_config=GenerationConfig(num_beams=1000))
    with pytest.raises(ValueError, match="it has 251 tokens, and the model has 250 positions"):
        model.generate(input_ids=torch.full((1, 250), 5), generation_config=GenerationConfig())
