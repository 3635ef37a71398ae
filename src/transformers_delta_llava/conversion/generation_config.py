"""How a converted model generates when nobody says otherwise."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
)
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..hub.tokenizer import TokenIds
from ..utils.files import read_json
from .chat_templates import answer_end_ids


Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]


class GenerationFlags(BaseModel):
    """Types of the flags that change what is generated; `None` stands for "not set" everywhere.

    transformers checks few of them before it generates, and then fails on the first request.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    do_sample: bool | None = None
    remove_invalid_values: bool | None = None
    renormalize_logits: bool | None = None
    token_healing: bool | None = None
    use_cache: bool | None = None
    max_length: Positive | None = None
    max_new_tokens: Positive | None = None
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    no_repeat_ngram_size: Count | None = None
    num_beams: Positive | None = None
    num_return_sequences: Positive | None = None
    top_k: Count | None = None
    epsilon_cutoff: NonNegativeFloat | None = None
    eta_cutoff: NonNegativeFloat | None = None
    guidance_scale: PositiveFloat | None = None
    length_penalty: FiniteFloat | None = None
    max_time: PositiveFloat | None = None
    min_p: NonNegativeFloat | None = None
    repetition_penalty: PositiveFloat | None = None
    temperature: PositiveFloat | None = None
    top_p: PositiveFloat | None = None
    typical_p: PositiveFloat | None = None
    bos_token_id: Count | None = None
    eos_token_id: Count | list[Count] | None = None
    pad_token_id: Count | None = None
    begin_suppress_tokens: list[Count] | None = None
    suppress_tokens: list[Count] | None = None
    bad_words_ids: list[list[Count]] | None = None
    stop_strings: str | list[str] | None = None


def read_generation_config(source: Path) -> tuple[GenerationConfig, str | None]:
    """The checkpoint's own generation settings, and a sentence on those that are not valid and were left out."""
    path = source / "generation_config.json"
    if not path.is_file():
        return GenerationConfig(), None
    config, dropped = keep_valid_flags(read_json(path))
    if not dropped:
        return config, None
    flags = ", ".join(f"{name}={json.dumps(value)[:60]}" for name, value in dropped.items())
    return config, f"generation_config.json: left out what transformers refuses there: {flags}."


def keep_valid_flags(values: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """Generation settings from flags by name, and the flags that were left out.

    Left out are unknown flags, values of another type, and flags that transformers refuses to save beside the others:
    Vicuna's own file sets a temperature and switches sampling off.
    """
    known = GenerationConfig().to_dict()
    # Notes of transformers to itself, and what was not set.
    pending = {n: v for n, v in values.items() if not n.startswith("_") and v is not None}
    try:
        GenerationFlags.model_validate(pending)
        wrong = set()
    except ValidationError as error:
        wrong = {str(fault["loc"][0]) for fault in error.errors()}
    dropped = {name: pending.pop(name) for name in list(pending) if name in wrong or name not in known}
    kept: dict[str, Any] = {}
    progress = True
    while progress:  # a flag may need another one first, as temperature needs do_sample
        progress = False
        for name in list(pending):
            if _is_valid({**kept, name: pending[name]}):
                kept[name] = pending.pop(name)
                progress = True
    return GenerationConfig.from_dict(kept), {**dropped, **pending}


def _is_valid(flags: dict[str, Any]) -> bool:
    try:
        GenerationConfig.from_dict(dict(flags)).validate(strict=True)
    except Exception:  # of many kinds: transformers uses values before it checks them
        return False
    return True


def fit_generation_config(
    config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    ids: TokenIds,
    text_config: PreTrainedConfig,
    chat_template: str,
) -> None:
    """Set the tokens that end an answer, that fill a batch, and that no answer may hold; in place.

    No answer may hold the tokens that this package adds. Rows above the tokenizer's ids need no suppression, since they
    repeat row 0 or are close to the mean row, and must have none: tokens that a user adds get these ids.

    Args:
        config: the settings to complete.
        tokenizer: with its tokens added, and `ids`, what was added.
        text_config: config of the language model, of the final vocabulary.
        chat_template: its Jinja source.
    """
    ends = [
        *_as_list(config.eos_token_id if config.eos_token_id is not None else text_config.eos_token_id),
        *_as_list(tokenizer.eos_token_id),
        *answer_end_ids(chat_template, tokenizer),
    ]
    ends = list(dict.fromkeys(ends))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    config.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    config.pad_token_id = ids.pad
    added = {ids.image, *tokenizer.convert_tokens_to_ids(ids.added)}
    config.suppress_tokens = sorted(added.union(config.suppress_tokens or ()))


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]
