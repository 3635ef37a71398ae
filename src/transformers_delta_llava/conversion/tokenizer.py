"""The tokenizer of a checkpoint, with the tokens that a vision-language model needs."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import transformers
from tokenizers import AddedToken, Regex, normalizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import DeltaLlavaError, one_line, read_json, read_optional_json, write_json
from ..hub import IMAGE_TOKEN, TEMPLATE_FILE, TOKENIZER_FILES
from ..loading import local_folder


PAD_TOKEN = "<pad>"
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# How the rule begins that adds SentencePiece's word mark to text after an image.
WORD_MARK_RULE = rf"(?:(?<={IMAGE_TOKEN})|"
# Settings that would run a source's code, or that describe the loading of it, paths among them.
_DROPPED_SETTINGS = (
    *("auto_map", "chat_template", "is_local", "local_files_only", "name_or_path", "processor_class"),
    *("tokenizer_file", "vocab_file", "merges_file"),
)


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in _VOCABULARY_FILES)


def load_tokenizer(
    model_id: str | Path, text_config: PreTrainedConfig, sentencepiece_class: str | None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub without running code from there.

    Args:
        model_id: a folder or a Hub id.
        text_config: config of the language model it belongs to.
        sentencepiece_class: tokenizer class for a folder that holds a `tokenizer.model` and does not say its class.

    Raises:
        DeltaLlavaError: there is no tokenizer, or none that can be read.
        ImportError: a `tokenizer.model` needs the packages sentencepiece and protobuf.
    """
    folder = local_folder(model_id, TOKENIZER_FILES)
    if not has_tokenizer(folder):
        raise DeltaLlavaError(
            f"{folder.name} has no tokenizer ({', '.join(_VOCABULARY_FILES)}); pass the folder or Hub id of the language "
            "model's as tokenizer"
        )
    bare_sentencepiece = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if bare_sentencepiece:  # without these, transformers asks for other packages, in vain
        import sentencepiece  # noqa: F401
    with tempfile.TemporaryDirectory() as copy:
        for name in TOKENIZER_FILES:
            if name != TEMPLATE_FILE and (folder / name).is_file():
                shutil.copyfile(folder / name, Path(copy) / name)
        _write_settings(Path(copy), sentencepiece_class if bare_sentencepiece else None)
        try:
            if bare_sentencepiece and sentencepiece_class:
                # AutoTokenizer would go by the language model's type, and lose the word mark for some of them.
                tokenizer = getattr(transformers, sentencepiece_class).from_pretrained(copy)
            else:
                tokenizer = AutoTokenizer.from_pretrained(copy, config=text_config)
        except Exception as error:  # of many kinds, and they name the copy
            raise DeltaLlavaError(f"the tokenizer in {folder.name} cannot be read: {one_line(error, 300)}") from error
    if not tokenizer.is_fast:
        raise DeltaLlavaError(f"the tokenizer in {folder.name} has no fast form (tokenizer.json), which engines need")
    return tokenizer


def read_own_template(model_id: str | Path) -> str | None:
    """The chat template that a tokenizer in a folder or on the Hub brings, or None."""
    folder = local_folder(model_id, TOKENIZER_FILES)
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    template = read_optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template or None


def _write_settings(folder: Path, sentencepiece_class: str | None) -> None:
    """Write out the defaults of the transformers that the authors used, which later ones changed."""
    path = folder / "tokenizer_config.json"
    settings = read_optional_json(path)
    for name in _DROPPED_SETTINGS:
        settings.pop(name, None)
    if sentencepiece_class:
        settings = {"tokenizer_class": sentencepiece_class, "add_bos_token": True, **settings}
    written_by_v5 = "backend" in settings  # its tokenizers do not mention `legacy`, and are what they are
    if str(settings.get("tokenizer_class")).startswith("LlamaTokenizer") and not written_by_v5:
        settings = {"legacy": True, **settings}
    write_json(settings, path)


@dataclass(frozen=True)
class TokenIds:
    """Ids of the image and the padding token, how many ids there are (the largest plus one), and the tokens added."""

    image: int
    pad: int
    count: int
    added: list[str]


def add_tokens(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Add the image token, and a padding token where there is none, each once; pad on the left from now on."""
    required = [IMAGE_TOKEN]
    if tokenizer.pad_token is None:
        required.append(PAD_TOKEN)
        tokenizer.pad_token = PAD_TOKEN
    known = tokenizer.get_vocab()
    added = [token for token in required if token not in known]
    if added or not _separates_at_images(tokenizer):
        tokens = [AddedToken(token, special=True, normalized=False) for token in required]
        tokenizer.add_tokens(tokens, special_tokens=True)
    if not _separates_at_images(tokenizer):
        _mark_first_words(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # only its arguments are saved
    image, pad = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, tokenizer.pad_token])
    return TokenIds(image, pad, max(tokenizer.get_vocab().values()) + 1, added)


def _separates_at_images(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether text after an image, and after BOS, encodes as a text of its own, as in the released code."""
    return all(
        tokenizer.encode(token + text, add_special_tokens=False)
        == [tokenizer.convert_tokens_to_ids(token), *tokenizer.encode(text, add_special_tokens=False)]
        for token in (IMAGE_TOKEN, tokenizer.bos_token)
        for text in ("What", "\nWhat")
        if token is not None
    )


def _mark_first_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Begin the text after an image, and after BOS at the start, with SentencePiece's word mark.

    The released code splits prompts at their images and encodes the pieces one by one, so each begins with the mark. A
    Llama tokenizer with `legacy=False` adds it only at the very start of a text, where templates write BOS. A rule before its
    normalizer adds the mark in these places and in no other: text after other special tokens stays as it is.
    """
    bos, eos = tokenizer.bos_token or IMAGE_TOKEN, tokenizer.eos_token or IMAGE_TOKEN
    start, end = re.escape(bos), re.escape(eos)
    pattern = WORD_MARK_RULE + rf"(?<=\A{start}))(?![ \u2581]|{IMAGE_TOKEN}|{start}|{end}|\z)"
    rule = normalizers.Replace(Regex(pattern), "\u2581")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([rule, *([backend.normalizer] if backend.normalizer else [])])
    # Normalisation sees no token that is not itself normalised.
    tokens = [AddedToken(token, special=True, normalized=True) for token in dict.fromkeys((IMAGE_TOKEN, bos, eos))]
    tokenizer.add_tokens(tokens, special_tokens=True)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, max_length: int | None) -> None:
    """Write the tokenizer in the form that every transformers version and engine reads.

    Args:
        tokenizer: with its tokens added.
        folder: where `tokenizer.json` and `tokenizer_config.json` go.
        max_length: longest prompt, where the checkpoint knows it.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    for name in _DROPPED_SETTINGS:
        settings.pop(name, None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    if max_length is not None:
        settings["model_max_length"] = max_length
    write_json(settings, path)
