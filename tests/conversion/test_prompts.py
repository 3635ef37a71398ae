"""Which chat template a conversion chooses, with the reason, and the generation settings that go with it."""

import copy
from functools import cache

import pytest
from transformers import AutoConfig, GenerationConfig

from examples.make_checkpoint import write_tokenizer
from tests.tiny import ANSWER_ENDS
from transformers_delta_llava.conversion.prompts import (
    answer_end,
    answer_end_ids,
    chat_template_warnings,
    choose_chat_template,
    fit_generation_config,
    keep_valid_flags,
    read_chat_template,
)
from transformers_delta_llava.conversion.tokenizer import add_tokens, load_tokenizer, read_own_template
from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.processing import CHAT_TEMPLATES, load_chat_template


OWN = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = load_tokenizer(str(folder), AutoConfig.for_model("llama"), None)
    add_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def make_tokenizer(plain_tokenizer):
    """A tokenizer with special tokens, the same one each time. Only to be read."""

    @cache
    def make(*special):
        tokenizer = copy.deepcopy(plain_tokenizer)
        tokenizer.add_tokens(list(special), special_tokens=True)
        return tokenizer

    return make


def source(model_type, base=None):
    """What the choice needs of a checkpoint's config."""
    return {"model_type": model_type, "_name_or_path": base}


VICUNA = source("llava_llama", "lmsys/vicuna-7b-v1.5")
LLAMA_3 = ("<|begin_of_text|>", "<|eot_id|>")
CHATML = ("<|im_start|>", "<|im_end|>")


# Model type, base model, special tokens, whether the tokenizer has its own template, and the name and reason of the choice.
KNOWN = [
    # The tokenizer's own, where the authors' training uses it.
    ("llava_seed_oss", "NousResearch/Hermes-4.3-36B", LLAMA_3, True, "tokenizer", "llava_seed_oss checkpoints"),
    ("llava_seed_oss", "NousResearch/Hermes-4.3-36B", LLAMA_3, False, "hermes-4", "called Hermes-4.3-36B"),
    ("llava_qwen3", "Qwen/Qwen3-8B", CHATML, True, "tokenizer", "llava_qwen3 checkpoints"),
    ("llava_qwen2", None, CHATML, True, "tokenizer", "llava_qwen2 checkpoints"),
    ("llava_qwen2", "hermes", CHATML, False, "chatml", "the format of llava_qwen2"),
    # The base model's name; the last part of a path first.
    ("llava_llama", "lmsys/vicuna-7b-v1.5", (), True, "vicuna_v1", "called vicuna-7b-v1.5"),
    ("llava_llama", "/data/llama-2/vicuna", (), False, "vicuna_v1", "called vicuna"),
    ("llava_llama", "liuhaotian/llava-v1.5-13b", (), False, "vicuna_v1", "called llava-v1.5-13b"),
    ("llava_llama", "meta-llama/Llama-2-7b-chat-hf", (), False, "llava_llama_2", "called Llama-2-7b-chat-hf"),
    ("llava_llama", "meta-llama/Meta-Llama-3-8B-Instruct", LLAMA_3, True, "llama3", "called Meta-Llama-3-8B"),
    ("llava_llama", "C:\\models\\Llama-3.1-8B\\snapshots\\0e9e39f", LLAMA_3, True, "llama3", "called Llama-3.1-8B"),
    ("llava_llama", "NousResearch/Nous-Hermes-2-Yi-34B", CHATML, False, "hermes-2", "called Nous-Hermes-2-Yi-34B"),
    ("llava_llama", "NousResearch/Hermes-2-Pro-Llama-3-8B", CHATML, False, "hermes-2", "called Hermes-2-Pro"),
    ("llava_llama", "NousResearch/Hermes-4-70B", LLAMA_3, False, "hermes-4", "called Hermes-4-70B"),
    ("llava_llama", "mistralai/Mistral-7B-Instruct-v0.2", (), False, "mistral_instruct", "called Mistral-7B"),
    ("llava_mistral", "teknium/OpenHermes-2.5-Mistral-7B", CHATML, True, "hermes-2", "called OpenHermes"),
    ("llava_mistral", "mistralai/Mistral-7B-Instruct-v0.2", (), True, "mistral_instruct", "called Mistral-7B"),
    # What the model's type says.
    ("llava_mistral", None, (), True, "mistral_instruct", "the format of llava_mistral"),
    ("llava_gemma", "/data/base", ("<start_of_turn>",), True, "gemma", "the format of llava_gemma"),
    ("llava_Phi3", "/data/base", (), False, "phi_3", "the format of llava_Phi3"),
    ("llava_phi3", None, (), False, "phi_3", "the format of llava_phi3"),
]
GUESSED = [
    ("llava_llama", "HuggingFaceTB/SmolLM2-135M-Instruct", CHATML, True, "tokenizer", "the tokenizer has its own"),
    ("llava_llama", "/data/llama-30b", LLAMA_3, False, "llama3", "the tokenizer has <|eot_id|>"),
    ("llava_llama", "openlm-research/open_llama_3b_v2", (), False, "vicuna_v1", "nothing in the checkpoint"),
    ("llava_llama", "princeton-nlp/Sheared-LLaMA-2.7B", (), False, "vicuna_v1", "nothing in the checkpoint"),
    ("llava_llama", None, CHATML, False, "chatml_direct", "the tokenizer has <|im_end|>"),
    ("llava_mistral", "/data/base", CHATML, True, "chatml_direct", "the tokenizer has <|im_end|>"),
    ("llava_llama", None, ("<start_of_turn>",), False, "gemma", "the tokenizer has <start_of_turn>"),
    ("llava_llama", None, ("[INST]",), False, "mistral_instruct", "the tokenizer has [INST]"),
    ("llava_llama", "/data/base", (), False, "vicuna_v1", "nothing in the checkpoint says which"),
    ("llava_seed_oss", "/data/base", (), False, "hermes-4", "nothing in the checkpoint says which"),
]


@pytest.mark.parametrize(
    ("case", "is_guess"), [*((case, False) for case in KNOWN), *((case, True) for case in GUESSED)]
)
def test_the_choice(make_tokenizer, case, is_guess):
    model_type, base, special, has_own, name, reason = case
    tokenizer = make_tokenizer(*special)
    chosen = choose_chat_template(None, source(model_type, base), None, tokenizer, OWN if has_own else None)
    assert (chosen.name, chosen.is_guess) == (name, is_guess)
    assert reason in chosen.reason
    assert name == "tokenizer" or load_chat_template(name) in chosen.text
    guesses = [warning for warning in chat_template_warnings(chosen, tokenizer) if "guess" in warning]
    assert len(guesses) == is_guess
    assert all(f"the chat template {name} is a guess ({chosen.reason})" in warning for warning in guesses)


def test_the_base_model_of_the_user_comes_before_that_of_the_config(make_tokenizer):
    assert choose_chat_template(None, VICUNA, "Meta-Llama-3-8B", make_tokenizer(*LLAMA_3), None).name == "llama3"


def test_the_choice_of_the_user_comes_first(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(*CHATML)
    own = tmp_path / "mine.jinja"
    own.write_text(OWN)
    for requested, name in (("hermes_4", "hermes-4"), ("tokenizer", "tokenizer"), (str(own), "mine.jinja")):
        chosen = choose_chat_template(requested, VICUNA, None, tokenizer, OWN)
        assert (chosen.name, chosen.reason, chosen.is_guess) == (name, "as requested", False)
    assert chosen.text == OWN
    for requested in ("tokenizer", "llama_4"):
        with pytest.raises(DeltaLlavaError, match="chat_template"):
            choose_chat_template(requested, VICUNA, None, tokenizer, None)


def test_a_format_without_its_tokens_gets_a_warning(make_tokenizer):
    chosen = choose_chat_template(
        None, source("llava_llama", "meta-llama/Meta-Llama-3-8B"), None, make_tokenizer(), None
    )
    (warning,) = chat_template_warnings(chosen, make_tokenizer())
    assert "'<|eot_id|>', which is not a special token" in warning
    assert chat_template_warnings(chosen, make_tokenizer(*LLAMA_3)) == []


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_tokens_that_end_an_answer(make_tokenizer, name):
    tokenizer = make_tokenizer(*LLAMA_3, *CHATML, "<|end|>", "<end_of_turn>", "<eos>")
    template = read_chat_template(name, tokenizer)
    assert answer_end(template, tokenizer) == ANSWER_ENDS[name]
    wanted = {"plain": [], "gemma": ["<end_of_turn>", "<eos>"]}.get(name, [ANSWER_ENDS[name].strip()])
    assert answer_end_ids(template, tokenizer) == tokenizer.convert_tokens_to_ids(wanted)


def test_an_own_template_gets_the_bos_that_the_tokenizer_adds(make_tokenizer):
    tokenizer = make_tokenizer(*CHATML)
    question = [{"role": "user", "content": "Hi"}]
    for own in (OWN, "{{ bos_token }}" + OWN):
        text = tokenizer.apply_chat_template(
            question, chat_template=read_chat_template("tokenizer", tokenizer, own), tokenize=False
        )
        assert text == "<s><|im_start|>user\nHi<|im_end|>\n"


def test_where_a_tokenizer_keeps_its_own_template(tmp_path):
    write_tokenizer(tmp_path)
    assert read_own_template(str(tmp_path)) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]}')
    assert read_own_template(str(tmp_path)) == "b"
    settings.write_text('{"chat_template": "c"}')
    assert read_own_template(str(tmp_path)) == "c"
    (tmp_path / "chat_template.jinja").write_text("d")
    assert read_own_template(str(tmp_path)) == "d"


TEXT = AutoConfig.for_model("llama", vocab_size=384, eos_token_id=2, bos_token_id=1)


@pytest.fixture
def tokenizer(tmp_path):
    """One that a test may change."""
    write_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(str(tmp_path / "tokenizer"), TEXT, None)


VICUNA_FLAGS = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "max_length": 4096, "_from_model_config": True}
QWEN_FLAGS = {"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": [2, 7], "_name_or_path": "/a/base"}


@pytest.mark.parametrize(
    ("flags", "dropped"),
    [(VICUNA_FLAGS, ["temperature", "top_p"]), (QWEN_FLAGS, []), ({"num_beams": 2}, []), ({}, [])],
)
def test_flags_of_sampling_go_where_it_is_off(flags, dropped, tmp_path):
    config, left_out = keep_valid_flags(flags)
    assert list(left_out) == dropped
    for name, value in flags.items():
        assert getattr(config, name, None) == (None if name in dropped or name.startswith("_") else value)
    config.save_pretrained(tmp_path)
    assert "/a/base" not in config.to_json_string()


def test_tokens(tokenizer):
    ids = add_tokens(tokenizer)
    config = GenerationConfig(suppress_tokens=[5])
    fit_generation_config(config, tokenizer, ids, TEXT, load_chat_template("vicuna_v1"))
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (2, 1, ids.pad)
    assert config.suppress_tokens == [5, ids.image, ids.pad, ids.video]


def test_a_padding_token_of_the_model_is_not_suppressed(tokenizer):
    tokenizer.pad_token = "</s>"
    ids = add_tokens(tokenizer)
    config = GenerationConfig()
    fit_generation_config(
        config, tokenizer, ids, AutoConfig.for_model("llama", vocab_size=320), load_chat_template("vicuna_v1")
    )
    assert config.suppress_tokens == [ids.image, ids.video]


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
