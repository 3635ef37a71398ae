"""The tokenizer of a checkpoint, with the tokens that a vision-language model needs, and the check of its ids.

transformers 5 builds a tokenizer by the class that a folder names, which gives other ids than the folder's own files for some texts.
So the files are read here: `tokenizer.json` as it is, `tokenizer.model` as SentencePiece computes.
"""

import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import DeltaLlavaError, one_line, read_json, read_optional_json, write_json
from ..hub import IMAGE_TOKEN, TEMPLATE_FILE, TOKENIZER_FILES
from ..loading import local_folder


PAD_TOKEN = "<pad>"
VIDEO_TOKEN = "<video>"
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# How the rule begins that adds SentencePiece's word mark to text after an image.
WORD_MARK_RULE = rf"(?:(?<={IMAGE_TOKEN})|"
_MARK = "\u2581"
# Settings that would run a source's code, or that describe the loading of it, paths among them.
_DROPPED_SETTINGS = (
    *("auto_map", "chat_template", "is_local", "local_files_only", "name_or_path", "processor_class"),
    *("tokenizer_file", "vocab_file", "merges_file"),
)
# Vocabularies are padded to a multiple of this, as is usual on the Hub.
_VOCABULARY_MULTIPLE = 64
# SentencePiece's numbers for kinds of models and pieces.
_BPE, _USER_DEFINED, _UNMERGED = 2, 4, {2, 3, 6}  # unknown, control, byte


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
    bare_sentencepiece = is_bare_sentencepiece(folder)
    if bare_sentencepiece:  # without these, transformers asks for other packages, without need
        import sentencepiece  # noqa: F401
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for name in TOKENIZER_FILES:
            if name != TEMPLATE_FILE and (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
        _write_settings(copy, sentencepiece_class if bare_sentencepiece else None)
        try:
            if bare_sentencepiece and sentencepiece_class:
                # AutoTokenizer would go by the language model's type, and lose the word mark for some of them.
                tokenizer = getattr(transformers, sentencepiece_class).from_pretrained(copy)
            else:
                tokenizer = AutoTokenizer.from_pretrained(copy, config=text_config)
            if tokenizer.is_fast:
                tokenizer = _with_own_ids(copy, tokenizer)
        except Exception as error:  # of many kinds, and they name the copy
            raise DeltaLlavaError(f"the tokenizer in {folder.name} cannot be read: {one_line(error, 300)}") from error
    if not tokenizer.is_fast:
        raise DeltaLlavaError(f"the tokenizer in {folder.name} has no fast form (tokenizer.json), which engines need")
    return tokenizer


def is_bare_sentencepiece(folder: Path) -> bool:
    """Whether a `tokenizer.model` is all that `folder` has of a vocabulary."""
    return (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()


def _with_own_ids(folder: Path, loaded: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`loaded` as the files in `folder` have it, where its class splits or merges text otherwise."""
    backend = loaded.backend_tokenizer
    if (folder / "tokenizer.json").is_file():
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif is_bare_sentencepiece(folder):
        own = _read_sentencepiece(folder, loaded)
    else:
        return loaded
    own.post_processor = backend.post_processor
    if _is_same(own, backend):
        return loaded
    own.save(str(folder / "tokenizer.json"))
    # Loaded as every repo's tokenizer is, by the one class that changes nothing, and has no special tokens by default.
    vocabulary = own.get_vocab()
    special = {name: token for name, token in loaded.special_tokens_map.items() if str(token) in vocabulary}
    settings = {**special, **read_json(folder / "tokenizer_config.json")}
    write_json({**settings, "tokenizer_class": PreTrainedTokenizerFast.__name__}, folder / "tokenizer_config.json")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _is_same(one: Tokenizer, other: Tokenizer) -> bool:
    def parts(tokenizer: Tokenizer) -> dict:
        content = json.loads(tokenizer.to_str())
        return {name: content[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}

    return parts(one) == parts(other)


def _read_sentencepiece(folder: Path, loaded: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer of `tokenizer.model` that gives SentencePiece's ids, with the added tokens of `loaded` at their own ids.

    transformers 5 orders merges by id instead of by score, and leaves out the word mark where a text begins with a space.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    if proto.trainer_spec.model_type != _BPE:
        return loaded.backend_tokenizer
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    added = {token.content: token for token in loaded.added_tokens_decoder.values()}
    listed = listed_tokens(folder)
    _place(vocabulary, {content: listed.get(content, vocabulary.get(content)) for content in added})
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type not in _UNMERGED}
    merges = [
        (-score, vocabulary[left], vocabulary[right], left, right)
        for piece, score in scores.items()
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if piece in vocabulary and left in scores and right in scores and {left, right} <= vocabulary.keys()
    ]
    own = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    is_marked = proto.normalizer_spec.add_dummy_prefix
    spaces = normalizers.Replace(" ", _MARK)
    if not is_marked:
        own.normalizer = spaces
    elif getattr(loaded, "legacy", True):  # each text between special tokens begins with a mark
        own.normalizer = normalizers.Sequence([normalizers.Prepend(_MARK), spaces])
    else:  # only the first one does, and `Metaspace` leaves the mark out before a space
        own.normalizer = normalizers.Replace(Regex(rf"\A(?=[ {_MARK}])"), _MARK)
        own.pre_tokenizer = pre_tokenizers.Metaspace(_MARK, prepend_scheme="first", split=False)
    whole = [p.piece for p in proto.pieces if p.type == _USER_DEFINED and p.piece not in added]
    if whole:  # pieces that are never merged with what is next to them
        pattern = "|".join(re.escape(piece) for piece in sorted(whole, key=len, reverse=True))
        own.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    own.decoder = loaded.backend_tokenizer.decoder
    ids = {content: listed.get(content, vocabulary.get(content, len(vocabulary) + len(listed))) for content in added}
    own.add_tokens(sorted(added.values(), key=lambda token: ids[token.content]))
    return own


def listed_tokens(folder: Path) -> dict[str, int]:
    """The ids of the added tokens that the files of a tokenizer state, by content."""
    listed = {
        token["content"]: token["id"]
        for token in read_optional_json(folder / "tokenizer.json").get("added_tokens", ())
    }
    decoder = read_optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    return {
        **read_optional_json(folder / "added_tokens.json"),
        **{token["content"]: int(index) for index, token in decoder.items()},
        **listed,
    }


def _place(vocabulary: dict[str, int], tokens: dict[str, int | None]) -> None:
    """Give each of the `tokens` its id in the vocabulary, if appending them in order would give one of them another."""
    appended = sorted(index for content, index in tokens.items() if index is not None and content not in vocabulary)
    misplaced = {
        content for content, index in tokens.items() if index is not None and vocabulary.get(content, index) != index
    }
    if not misplaced and appended == list(range(len(vocabulary), len(vocabulary) + len(appended))):
        return
    pieces = {index: piece for piece, index in vocabulary.items() if piece not in misplaced}
    pieces |= {index: content for content, index in tokens.items() if index is not None}
    vocabulary.clear()
    vocabulary |= {pieces.get(index, f"<unused_{index}>"): index for index in range(max(pieces) + 1)}


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
    """Ids of the image, video and padding token, how many ids there are (the largest plus one), and the tokens added."""

    image: int
    video: int | None
    pad: int
    count: int
    added: list[str]


def add_tokens(tokenizer: PreTrainedTokenizerBase, rows: int = 0) -> TokenIds:
    """
    Add the image token, a padding token where there is none, and the video token where a row is free; pad on the left.

    Args:
        tokenizer: changed in place.
        rows: of the embeddings that the tokenizer is for; 0 where there are none yet.
    """
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
    count = max(tokenizer.get_vocab().values()) + 1
    if VIDEO_TOKEN not in known and count < padded_vocab_size(rows, count):
        tokenizer.add_tokens([AddedToken(VIDEO_TOKEN, special=True, normalized=False)], special_tokens=True)
        added, count = [*added, VIDEO_TOKEN], count + 1
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # only its arguments are saved
    image, pad = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, tokenizer.pad_token])
    return TokenIds(image, tokenizer.get_vocab().get(VIDEO_TOKEN), pad, count, added)


def padded_vocab_size(rows: int, needed: int) -> int:
    """Rows of the embeddings for `needed` token ids: `rows` where they suffice, else rounded up to a multiple of 64."""
    return rows if needed <= rows else -(-needed // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


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
    added = (token for token in tokenizer.added_tokens_decoder.values() if token.content != IMAGE_TOKEN)
    # Normalisation sees no token that is not itself normalised, and those cannot swallow spaces.
    visible = [
        AddedToken(IMAGE_TOKEN, special=True),
        *(token for token in added if not (token.lstrip or token.rstrip)),
    ]
    names = [re.escape(token.content) for token in visible]
    start = re.escape(tokenizer.bos_token or IMAGE_TOKEN)
    rule = normalizers.Replace(Regex(WORD_MARK_RULE + rf"(?<=\A{start}))(?!{'|'.join(names)}|\z)"), _MARK)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([rule, *([backend.normalizer] if backend.normalizer else [])])
    tokens = [AddedToken(token.content, special=token.special, normalized=True) for token in visible]
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


def check_token_ids(repo: Path, source: Path) -> None:
    """Compare the ids of a repo's tokenizer with those of the tokenizer that it was made from, on a few thousand texts.

    Args:
        repo: folder with the tokenizer that was written.
        source: folder with the `tokenizer.json` or `tokenizer.model` that the language model was trained with.

    Raises:
        DeltaLlavaError: naming a text, or an added token, that has other ids.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(repo)
    listed = listed_tokens(source)
    for token, index in listed.items():
        if tokenizer.convert_tokens_to_ids(token) != index:
            raise DeltaLlavaError(
                f"the token {token!r} has id {index} in {source.name}, and {tokenizer.convert_tokens_to_ids(token)} in the "
                "converted tokenizer"
            )
    encode = _source_encoding(source)
    if encode is None:
        return
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    vocabulary = sorted(tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys())
    for text in _sample_texts(vocabulary):
        if any(token in text for token in tokenizer.added_tokens_encoder):
            continue
        ids = encode(text)
        for prompt, expected in ((text, ids), (f"{IMAGE_TOKEN}{text}", [image, *ids])):
            if tokenizer.encode(prompt, add_special_tokens=False) != expected:
                raise DeltaLlavaError(
                    f"the converted tokenizer gives other ids than {source.name} for {prompt!r}: convert with a tokenizer whose "
                    "tokenizer.json gives the ids that the language model was trained with (option tokenizer)"
                )


def _source_encoding(folder: Path) -> Callable[[str], list[int]] | None:
    """The ids of a text by the files in `folder`, without transformers; None where these do not determine them."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    if is_bare_sentencepiece(folder):
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode
    return None


_TEXTS = (
    *("Hello.  How are   you? ", " Hello", "   indented", "\ttab", "a\n\n\nb", "\n", " ", "end  \n  ", "1 22 333 4444 55555 3.14159"),
    "def f(x):\n    if x  ==  1:\n\t\treturn [x for x in range(10)]\n\n# comment\n",
    *("it's WE'LL they're", "e.g. (a) [b] {c} <d/> & | ~ ` ^", "https://example.org/a_b?c=d#e", "\u00a0no-break\u2003em\u200bzero"),
    *("\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002 \u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8", "\ud55c\uad6d\uc5b4 \ubb38\uc7a5", "\u0440\u0443\u0441\u0441\u043a\u0438\u0439  \u0442\u0435\u043a\u0441\u0442", "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd"),
    *("\U0001f600\U0001f600  \U0001f468\u200d\U0001f469\u200d\U0001f467", "caf\u00e9 cafe\u0301 \ufb01 \uff21\uff22", "\u2581mark\u2581\u2581", "a\u2028b\r\nc"),
)  # fmt: skip


def _sample_texts(vocabulary: list[str], count: int = 3000) -> Iterator[str]:
    """Texts with what tokenizers differ in, and `count` that are joined from these and from pieces of `vocabulary`."""
    yield from _TEXTS
    generator = random.Random(0)
    words = [word for text in _TEXTS for word in re.findall(r"\s+|\S+", text)]
    for _ in range(count):
        pieces = [
            generator.choice(vocabulary).replace(_MARK, " ") if generator.random() < 0.6 else generator.choice(words)
            for _ in range(generator.randint(1, 12))
        ]
        yield generator.choice(("", " ")).join(pieces)
