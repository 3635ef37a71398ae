"""Small tokenizers of the kinds that the language models of the authors' checkpoints have, in the files that training leaves.

Vocabularies are learned from a few sentences; kinds of model, special tokens with their flags, settings and files are those of
the real ones. Models with a SentencePiece tokenizer leave a `tokenizer.model` without a `tokenizer.json`, because the
authors' code loads slow tokenizers.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast


TEXT = """\
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and
polite answers to the user's questions. USER: What is in this picture? ASSISTANT: The picture shows a cat with green
eyes that looks at something outside of the frame. USER: Describe the image in detail. ASSISTANT: The image is a close
view of the face of a brown cat with stripes, long white whiskers and a pink nose; the background is out of focus.
"""
# By `model_type`: the tokenizer of the base model that the authors' code takes for it.
KINDS = {
    "llava_llama": "vicuna",
    "llava_mistral": "mistral",
    "llava_gemma": "gemma",
    "llava_Phi3": "phi3",
    "llava_phi3": "phi3",
    "llava_seed_oss": "hermes4",
    "llava_qwen": "qwen",
    "llava_qwen2": "qwen",
    "llava_qwen3": "qwen",
}
# SentencePiece models: whether `legacy` of their settings is set, and what is added to the model's own tokens.
_SENTENCEPIECE: dict[str, tuple[bool, list[str]]] = {
    "vicuna": (False, []),
    "mistral": (True, []),
    "openhermes": (False, ["<|im_start|>", "<|im_end|>"]),
    "phi3": (False, ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]),
}
_LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_LLAMA_3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# How these models cut text into words before byte pairs are merged.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tokenizer(folder: Path, kind: str = "plain") -> dict[str, int | None]:
    """Write a tokenizer into `folder`.

    Args:
        folder: an existing folder.
        kind: `plain`, one of `KINDS`' values, or `llama3`, `openhermes` (ChatML on SentencePiece) or `qwen_base`.

    Returns:
        What a language model's config says of it: `vocab_size`, and the ids of its special tokens. Nothing for the plain
        one, which fits any model of at least 300 rows.
    """
    if kind == "plain":
        _write_plain(folder)
        return {}
    if kind in _SENTENCEPIECE:
        return _write_llama(folder, kind)
    if kind == "gemma":
        return _write_gemma(folder)
    if kind in ("qwen", "qwen_base"):
        return _write_qwen(folder, is_base=kind == "qwen_base")
    return _write_llama_3(folder, is_base=kind == "llama3")


def _write_plain(folder: Path) -> None:
    """A byte-level tokenizer of 300 tokens that spells ASCII, opens texts with `<s>` and has no padding token."""
    tokenizer = _byte_pairs(["<unk>", "<s>", "</s>"], 300, ascii_only=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )
    fast.save_pretrained(folder)


def _write_llama(folder: Path, kind: str) -> dict[str, int | None]:
    legacy, added = _SENTENCEPIECE[kind]
    size = _train_sentencepiece(folder, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    decoder = {str(i): _entry(token) for i, token in enumerate(("<unk>", "<s>", "</s>"))}
    # Phi-3's special tokens swallow the space and the newline behind them.
    decoder |= {
        str(size + i): _entry(token, rstrip=kind == "phi3" and token != "<|endoftext|>")
        for i, token in enumerate(added)
    }
    end = "<|endoftext|>" if kind == "phi3" else "</s>"
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "legacy": legacy,
        "model_max_length": 2048,
        "pad_token": end if kind == "phi3" else "<unk>" if kind == "vicuna" else None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    _write_settings(folder, settings)
    if added:
        _write_json(folder / "added_tokens.json", {token: size + i for i, token in enumerate(added)})
    return _ids(settings, size + len(added))


def _write_gemma(folder: Path) -> dict[str, int | None]:
    turns = ["<start_of_turn>", "<end_of_turn>"]
    pieces = {"pad_piece": "<pad>", "bos_piece": "<bos>", "eos_piece": "<eos>"}
    size = _train_sentencepiece(
        folder,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["<mask>", *turns],
        add_dummy_prefix=False,
        **pieces,
    )
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *turns]
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): _entry(token) for i, token in enumerate(names)},
        "additional_special_tokens": turns,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
    }
    _write_settings(folder, settings)
    return _ids(settings, size)


def _write_qwen(folder: Path, is_base: bool) -> dict[str, int | None]:
    tokenizer = _byte_pairs([], 350)
    content = json.loads(tokenizer.to_str())["model"]
    _write_json(folder / "vocab.json", content["vocab"])
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in content["merges"]), encoding="utf-8")
    size = len(content["vocab"])
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    _write_json(folder / "added_tokens.json", {token: size + i for i, token in enumerate(added)})
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(size + i): _entry(token) for i, token in enumerate(added)},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": None if is_base else _QWEN_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>" if is_base else "<|im_end|>",
        "errors": "replace",
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write_settings(folder, settings)
    return _ids(settings, size + len(added))


def _write_llama_3(folder: Path, is_base: bool) -> dict[str, int | None]:
    """Llama 3's base model, or Hermes 4, which has the same format and brings its template."""
    tokenizer = _byte_pairs([], 350)
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _LLAMA_3])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{_LLAMA_3[0]} $A", pair=f"{_LLAMA_3[0]} $A $B", special_tokens=[(_LLAMA_3[0], size)]
            ),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "added_tokens_decoder": {str(size + i): _entry(token) for i, token in enumerate(_LLAMA_3)},
        "bos_token": _LLAMA_3[0],
        "chat_template": None if is_base else _LLAMA_3_TEMPLATE,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|end_of_text|>" if is_base else "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 2048,
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_settings(folder, settings)
    return _ids(settings, size + len(_LLAMA_3))


def _byte_pairs(special: list[str], size: int, ascii_only: bool = False) -> Tokenizer:
    """A byte-level tokenizer, trained on `TEXT`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if "<unk>" in special else None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if ascii_only:
        alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # "Ġ" and "Ċ": space and newline
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return tokenizer


def _train_sentencepiece(folder: Path, **settings: Any) -> int:
    """Write a `tokenizer.model` as Llama's: byte pairs with byte fallback, spaces kept."""
    import sentencepiece  # only these kinds need it

    size = 400
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 5),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )
    (folder / "tokenizer.vocab").unlink()
    return size


def _ids(settings: dict, size: int) -> dict[str, int | None]:
    by_token = {entry["content"]: int(number) for number, entry in settings["added_tokens_decoder"].items()}
    ids = {f"{name}_id": by_token.get(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    return {"vocab_size": size, **ids}


def _entry(token: str, rstrip: bool = False) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": rstrip, "single_word": False, "special": True}
    return {"content": token, **flags}


def _write_settings(folder: Path, settings: dict) -> None:
    """`tokenizer_config.json` and `special_tokens_map.json`, as transformers 4 writes them."""
    _write_json(folder / "tokenizer_config.json", settings)
    names = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)}
    _write_json(folder / "special_tokens_map.json", names)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
