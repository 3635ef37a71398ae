"""How a converted model generates when nobody says otherwise."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..utils.files import read_json
from .language_models import TURN_ENDS
from .tokenizer import TokenIds


def read_generation_config(source: Path) -> tuple[GenerationConfig, str | None]:
    """The checkpoint's own generation settings, or transformers' defaults and a sentence on why.

    Vicuna's own file is among those that newer transformers refuse: it sets a temperature and switches sampling off.
    """
    path = source / "generation_config.json"
    if not path.is_file():
        return GenerationConfig(), None
    try:
        known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
        config = GenerationConfig.from_dict({name: value for name, value in read_json(path).items() if name in known})
        config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        return GenerationConfig(), f"generation_config.json is not valid and was replaced by defaults: {reason}"
    return config, None


def fit_generation_config(
    config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    ids: TokenIds,
    text_config: PreTrainedConfig,
    source_rows: int,
    chat_template: str,
) -> None:
    """Set the tokens that end an answer, that fill a batch, and that no answer may hold; in place.

    Args:
        config: the settings to complete.
        tokenizer: with its tokens added, and `ids`, what was added.
        text_config: config of the language model, of the final vocabulary.
        source_rows: size of the vocabulary that was trained; the rows above it are not tokens.
        chat_template: name of the prompt format.
    """
    turn_end = TURN_ENDS.get(chat_template)
    known_turn_end = turn_end is not None and turn_end in tokenizer.get_vocab()
    ends = [
        *_as_list(config.eos_token_id if config.eos_token_id is not None else text_config.eos_token_id),
        *_as_list(tokenizer.eos_token_id),
        *([tokenizer.convert_tokens_to_ids(turn_end)] if known_turn_end else []),
    ]
    ends = list(dict.fromkeys(ends))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    config.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    config.pad_token_id = ids.pad
    untrained = {ids.image, *tokenizer.convert_tokens_to_ids(ids.added), *range(source_rows, text_config.vocab_size)}
    config.suppress_tokens = sorted(untrained.union(config.suppress_tokens or ()))


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]
