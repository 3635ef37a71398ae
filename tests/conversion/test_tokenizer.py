"""Tokenizers of every kind, with the tokens a vision-language model needs."""

import json
import shutil
import sys
from functools import partial

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer

from examples.make_tokenizer import write_tokenizer
from transformers_delta_llava.conversion.tokenizer import (
    TokenIds,
    add_tokens,
    check_token_ids,
    has_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from transformers_delta_llava.errors import DeltaLlavaError


TEXT = AutoConfig.for_model("llama", vocab_size=320)


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    """A `tokenizer.model` as Llama's: byte fallback, spaces kept."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER:  what is in   the picture? ASSISTANT: a cat", "    what  is   in"] * 20),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def edit_settings(folder, **values):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_tokens_are_added_once(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder), TEXT, None)
    count = len(tokenizer)
    ids = add_tokens(tokenizer)
    assert ids == TokenIds(count, count + 2, count + 1, count + 3, ["<image>", "<pad>", "<video>"])
    save_tokenizer(tokenizer, tmp_path / "saved", 2048)
    again = load_tokenizer(str(tmp_path / "saved"), TEXT, None)
    assert add_tokens(again) == TokenIds(count, count + 2, count + 1, count + 3, [])
    full = load_tokenizer(str(folder), TEXT, None)
    rows = -(-count // 64) * 64
    full.add_tokens([f"<{index}>" for index in range(rows - count - 2)])
    assert add_tokens(full, rows) == TokenIds(rows - 2, None, rows - 1, rows, ["<image>", "<pad>"])


def test_a_padding_token_that_is_there_stays(folder):
    edit_settings(folder, pad_token="<unk>")
    ids = add_tokens(load_tokenizer(str(folder), TEXT, None))
    assert (ids.pad, ids.added) == (0, ["<image>", "<video>"])


def test_a_saved_tokenizer_is_readable_everywhere(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder), TEXT, None)
    add_tokens(tokenizer)
    save_tokenizer(tokenizer, tmp_path / "saved", 2048)
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["padding_side"] == "left"
    assert not settings.keys() & {"auto_map", "is_local", "local_files_only", "chat_template", "name_or_path"}
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "USER: <image>\nwhat is this?</s>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again(text).input_ids[0] == again.bos_token_id == 1
    assert (again.padding_side, again.pad_token, again.model_max_length) == ("left", "<pad>", 2048)
    batch = again(["a", "a cat"])
    assert again.pad(batch, padding=True)["input_ids"][0][0] == again.pad_token_id
    save_tokenizer(load_tokenizer(str(folder), TEXT, None), tmp_path / "unlimited", None)
    assert AutoTokenizer.from_pretrained(tmp_path / "unlimited").model_max_length > 10**9


def test_code_in_the_folder_is_not_run(folder):
    edit_settings(folder, auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]}, chat_template="{{ evil }}")
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    (folder / "config.json").write_text('{"model_type": "llava_llama"}')
    tokenizer = load_tokenizer(str(folder), TEXT, None)
    assert tokenizer.chat_template is None
    assert "evil" not in sys.modules


def _released_encoding(tokenizer, prompt):
    """The ids of the released code: the pieces between images are encoded one by one; None for each image."""
    ids = [tokenizer.bos_token_id]
    for index, piece in enumerate(prompt.split("<image>")):
        ids += [None] * (index > 0) + tokenizer.encode(piece, add_special_tokens=False)
    return ids


# Text of every kind before, between and behind images.
WITH_IMAGES = [
    "USER: <image>\nwhat is in  the picture? ASSISTANT: a cat</s>USER: <image>\n<image>\nwhat?",
    "<image>a cat\n",
    "<image><image>1 cat</s><image>",
    "USER: <image> what?</s>USER: <image>  a",
    "</s><s>a <s>USER: <image></s><s>a",
    "<image></s>a<image>\u2581cat<image>\n\n\u00e9<image>\u00a0a",
]


# The settings that such folders come with; without any, the authors' version of transformers meant the last one.
@pytest.mark.parametrize(
    ("settings", "mark_after_end"),
    [
        ({"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}, False),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, True),
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        (None, True),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_folder_with_only_a_sentencepiece_model(sentencepiece_file, tmp_path, model_type, settings, mark_after_end):
    import sentencepiece

    text_config = AutoConfig.for_model(model_type, vocab_size=320)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert has_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), text_config, "LlamaTokenizer")
    expected = [_released_encoding(tokenizer, prompt) for prompt in WITH_IMAGES]
    ids = add_tokens(tokenizer)
    save_tokenizer(tokenizer, tmp_path / "saved", None)
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for prompt, pieces in zip(WITH_IMAGES, expected):
        expected_ids = [ids.image if i is None else i for i in pieces]
        assert saved(prompt).input_ids == expected_ids, prompt
        # A template may write BOS, and an engine then encodes without special tokens.
        assert saved(f"<s>{prompt}", add_special_tokens=False).input_ids == expected_ids, prompt
    # A repo's tokenizer is not changed again.
    assert add_tokens(again := load_tokenizer(str(tmp_path / "saved"), text_config, None)).added == []
    assert again.backend_tokenizer.to_str() == saved.backend_tokenizer.to_str()

    plain = "USER: what is in  the picture?\n\nASSISTANT: \u00e9"
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert saved(plain).input_ids == [1, *original.encode(plain)]
    check_token_ids(tmp_path / "saved", tmp_path)
    for text in ("what  is", " what", "    what  is   in\n  a", "a   b "):
        assert saved.encode(text, add_special_tokens=False) == original.encode(text)
        assert saved.encode(f"<image>{text}", add_special_tokens=False) == [ids.image, *original.encode(text)]
    after_end = saved.convert_ids_to_tokens(saved("a</s>USER").input_ids)
    assert (after_end[after_end.index("</s>") + 1].startswith("\u2581")) is mark_after_end


def test_folders_without_a_readable_tokenizer(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(DeltaLlavaError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path), TEXT, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DeltaLlavaError, match="cannot be read"):
        load_tokenizer(str(tmp_path), TEXT, None)


def token(content):
    flags = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
    return {"content": content, "special": True, **flags}


@pytest.mark.parametrize(
    "ids", [(6, 7), (310, 311), (300, 302)], ids=["in the vocabulary", "behind a gap", "with a gap"]
)
def test_added_tokens_keep_their_ids(sentencepiece_file, tmp_path, ids):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    names = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
    decoder = {str(index): token(name) for index, name in zip((0, 1, 2, *ids), names)}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": decoder}))
    tokenizer = load_tokenizer(tmp_path, TEXT, "LlamaTokenizer")
    added = add_tokens(tokenizer)
    save_tokenizer(tokenizer, tmp_path / "saved", None)
    check_token_ids(tmp_path / "saved", tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.convert_tokens_to_ids(names[3:]) == list(ids) and saved.eos_token_id == ids[1]
    assert (added.image, added.count) == (max(300, ids[1] + 1), max(300, ids[1] + 1) + 3)
    assert saved.encode("<|im_start|><|im_end|>", add_special_tokens=False) == list(ids)


@pytest.mark.parametrize("tokenizer_class", [None, "GPT2TokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "seed_oss", "mistral"])
def test_a_tokenizer_json_keeps_its_splitting_rules(tmp_path, model_type, tokenizer_class):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,2}|\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(["what  is 12345 in   the picture's 1234?"] * 20, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", **({"tokenizer_class": tokenizer_class} if tokenizer_class else {})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path, AutoConfig.for_model(model_type), None)
    add_tokens(loaded)
    save_tokenizer(loaded, tmp_path / "saved", None)
    check_token_ids(tmp_path / "saved", tmp_path)
    for text in ("what  is 12345", "  the picture's", "?1234"):
        expected = tokenizer.encode(text).ids
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode(text, add_special_tokens=False) == expected


def test_other_ids_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    content = json.loads((folder / "tokenizer.json").read_text())
    check_token_ids_of = partial(check_token_ids, tmp_path / "other", folder)
    tokenizer = load_tokenizer(folder, TEXT, None)
    add_tokens(tokenizer)
    save_tokenizer(tokenizer, tmp_path / "other", None)
    check_token_ids_of()
    content["model"]["merges"] = content["model"]["merges"][5:]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DeltaLlavaError, match="tokenizer"):
        check_token_ids_of()
    content["added_tokens"][0]["id"] = 299
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DeltaLlavaError, match="299"):
        check_token_ids_of()
