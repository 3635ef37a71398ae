"""generation_config.json: what ends an answer, what fills a batch, what no answer may hold."""

import json

import pytest
from transformers import AutoConfig, GenerationConfig

from examples.make_checkpoint import write_tokenizer
from transformers_delta_llava.conversion.generation import fit_generation_config, read_generation_config
from transformers_delta_llava.conversion.tokenizer import add_tokens, load_tokenizer


TEXT = AutoConfig.for_model("llama", vocab_size=384, eos_token_id=2, bos_token_id=1)


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(str(tmp_path / "tokenizer"), TEXT, None)


def test_the_sources_own(tmp_path):
    settings = {"do_sample": True, "temperature": 0.2, "eos_token_id": [2, 7], "_name_or_path": "/somewhere/base"}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    config, warning = read_generation_config(tmp_path)
    assert (config.temperature, config.eos_token_id, warning) == (0.2, [2, 7], None)
    assert "/somewhere" not in config.to_json_string()


def test_one_that_is_not_valid_is_replaced(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9, "top_p": 0.6}')
    config, warning = read_generation_config(tmp_path)
    assert config.temperature != 0.9
    assert "not valid" in warning
    config.save_pretrained(tmp_path)


def test_none_is_fine(tmp_path):
    assert read_generation_config(tmp_path)[1] is None


def test_tokens(tokenizer):
    ids = add_tokens(tokenizer)
    config = GenerationConfig(suppress_tokens=[5])
    fit_generation_config(config, tokenizer, ids, TEXT, 320, "vicuna_v1")
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (2, 1, ids.pad)
    assert config.suppress_tokens == [5, ids.image, ids.pad, *range(320, 384)]


def test_a_padding_token_of_the_model_is_not_suppressed(tokenizer):
    tokenizer.pad_token = "</s>"
    ids = add_tokens(tokenizer)
    config = GenerationConfig()
    fit_generation_config(config, tokenizer, ids, AutoConfig.for_model("llama", vocab_size=320), 320, "vicuna_v1")
    assert config.suppress_tokens == [ids.image]


def test_the_end_of_a_turn_ends_an_answer(tokenizer):
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    config = GenerationConfig(eos_token_id=9)
    fit_generation_config(config, tokenizer, add_tokens(tokenizer), TEXT, 384, "chatml")
    assert config.eos_token_id == [9, 2, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_no_end_at_all(tokenizer):
    tokenizer.eos_token = None
    config = GenerationConfig()
    text = AutoConfig.for_model("llama", vocab_size=384, eos_token_id=None)
    fit_generation_config(config, tokenizer, add_tokens(tokenizer), text, 384, "gemma")
    assert config.eos_token_id is None
