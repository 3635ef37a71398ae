"""generation_config.json: what ends an answer, what fills a batch, what no answer may hold."""

import json

import pytest
from transformers import AutoConfig, GenerationConfig

from examples.make_tokenizer import write_tokenizer
from transformers_delta_llava.conversion.generation_config import fit_generation_config, read_generation_config
from transformers_delta_llava.conversion.tokenizer import add_tokens, load_tokenizer
from transformers_delta_llava.processing import load_chat_template


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


GOOD = {"eos_token_id": [2, 7], "repetition_penalty": 1.2, "max_new_tokens": 40, "do_sample": False}


@pytest.mark.parametrize(
    "offending",
    [
        {"temperature": 0.9, "top_p": 0.6},
        {"early_stopping": True},
        {"num_return_sequences": 3},
        {"temperature": 0, "max_length": -1},
        {"cache_implementation": "none of them"},
        {"suppress_tokens": "x", "watermarking_config": 3},
        {"begin_suppress_tokens": [True], "top_k": "50"},
        {"length_penalty": float("nan"), "min_length": 10**400, "stop_strings": [1]},
        {"no_such_flag": 1},
    ],
    ids=str,
)
def test_flags_that_offend_are_left_out_by_name_and_the_others_stay(offending, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({**offending, **GOOD}))
    config, warning = read_generation_config(tmp_path)
    assert {name: getattr(config, name) for name in GOOD} == GOOD
    defaults = GenerationConfig().to_dict()
    for name in offending:
        assert f" {name}=" in warning and getattr(config, name, None) == defaults.get(name)
    config.save_pretrained(tmp_path)
    assert read_generation_config(tmp_path)[1] is None


def test_flags_that_need_another_one_stay_in_any_order(tmp_path):
    flags = {"temperature": 0.2, "early_stopping": True, "num_beams": 2, "num_return_sequences": 2, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(flags))
    config, warning = read_generation_config(tmp_path)
    assert warning is None and {name: getattr(config, name) for name in flags} == flags


def test_none_is_fine(tmp_path):
    assert read_generation_config(tmp_path)[1] is None


def test_tokens(tokenizer):
    ids = add_tokens(tokenizer)
    config = GenerationConfig(suppress_tokens=[5])
    fit_generation_config(config, tokenizer, ids, TEXT, load_chat_template("vicuna_v1"))
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (2, 1, ids.pad)
    assert config.suppress_tokens == [5, ids.image, ids.pad]


def test_a_padding_token_of_the_model_is_not_suppressed(tokenizer):
    tokenizer.pad_token = "</s>"
    ids = add_tokens(tokenizer)
    config = GenerationConfig()
    fit_generation_config(
        config, tokenizer, ids, AutoConfig.for_model("llama", vocab_size=320), load_chat_template("vicuna_v1")
    )
    assert config.suppress_tokens == [ids.image]


def test_the_end_of_a_turn_ends_an_answer(tokenizer):
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    config = GenerationConfig(eos_token_id=9)
    fit_generation_config(config, tokenizer, add_tokens(tokenizer), TEXT, load_chat_template("chatml"))
    assert config.eos_token_id == [9, 2, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_no_end_at_all(tokenizer):
    tokenizer.eos_token = None
    config = GenerationConfig()
    text = AutoConfig.for_model("llama", vocab_size=384, eos_token_id=None)
    fit_generation_config(config, tokenizer, add_tokens(tokenizer), text, load_chat_template("gemma"))
    assert config.eos_token_id is None
