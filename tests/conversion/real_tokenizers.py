"""Small tokenizers of the kinds that language models bring, as folders of the authors' checkpoints hold them.

Each writer returns the tokenizer that their code encodes with.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

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
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


TEXT = [
    "A chat: what is in this image? It is a cat. How many? Two. Sure? Yes. USER: ASSISTANT: The answer, naturally."
] * 20
# Llama 3's and Qwen's way of cutting text into words.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def sentencepiece_model() -> Path:
    """A `tokenizer.model` as Llama's: byte fallback, spaces kept."""
    import sentencepiece

    prefix = Path(mkdtemp()) / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(prefix),
        vocab_size=310,
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


def write_sentencepiece(folder: Path, special: tuple[str, ...] = (), legacy: bool | None = None) -> LlamaTokenizer:
    """Llama's, Mistral's and, with `special` tokens that swallow the space behind them, Phi-3's; no `legacy` means True."""
    shutil.copyfile(sentencepiece_model(), folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    if legacy is not None:
        settings["legacy"] = legacy
    if special:
        first = 310
        flags = {"lstrip": False, "normalized": False, "rstrip": special[0] == "<|end|>", "single_word": False}
        settings["added_tokens_decoder"] = {
            str(first + index): {"content": token, "special": True, **flags} for index, token in enumerate(special)
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return LlamaTokenizer.from_pretrained(folder, legacy=legacy is not False)


def write_byte_level(
    folder: Path, special: tuple[str, ...], bos: str | None, eos: str, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Llama 3's with a `bos`, ChatML's without."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos is not None:
        pair = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
    return _save(tokenizer, folder, bos, eos, chat_template)


def write_gemma(folder: Path) -> PreTrainedTokenizerFast:
    """Gemma's: byte fallback, spaces as letters, no word mark at the start."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + fallback, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    # Trained as special tokens, so that they have ids; they are not.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return _save(tokenizer, folder, "<bos>", "<eos>", pad="<pad>", unk="<unk>")


def _save(
    tokenizer: Tokenizer, folder: Path, bos: str | None, eos: str, chat_template: str | None = None, **tokens: str
) -> PreTrainedTokenizerFast:
    named = {f"{name}_token": token for name, token in tokens.items()}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **named)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def encode_as_the_authors(tokenizer: PreTrainedTokenizerBase, text: str, image_ids: list[int]) -> list[int]:
    """Token ids of a prompt: BOS once, if the tokenizer adds it, and the pieces between images encoded alone."""
    bos = tokenizer.bos_token_id
    ids = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
    for index, piece in enumerate(text.split("<image>")):
        ids += image_ids * (index > 0) + tokenizer.encode(piece, add_special_tokens=False)
    return ids[1:] if ids[:2] == [bos, bos] else ids
