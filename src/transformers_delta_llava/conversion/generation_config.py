"""The generation settings of a converted model."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeFloat, PositiveFloat, ValidationError, create_model
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..utils.files import read_optional_json
from .prompts import answer_end_ids
from .tokenizer import TokenIds


Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
_FLAG_TYPES: dict[Any, str] = {
    bool: "do_sample remove_invalid_values renormalize_logits token_healing use_cache",
    Positive: "max_length max_new_tokens num_beams num_return_sequences",
    Count: "min_length min_new_tokens no_repeat_ngram_size top_k bos_token_id pad_token_id",
    NonNegativeFloat: "epsilon_cutoff eta_cutoff min_p",
    PositiveFloat: "guidance_scale max_time repetition_penalty temperature top_p typical_p",
    FiniteFloat: "length_penalty",
    Count | list[Count]: "eos_token_id",
    list[Count]: "begin_suppress_tokens suppress_tokens",
    list[list[Count]]: "bad_words_ids",
    str | list[str]: "stop_strings",
}
# Types of the flags that change what is generated. transformers checks few of them before it generates, and then fails on
# the first request.
GenerationFlags = create_model(  # type: ignore[call-overload]
    "GenerationFlags",
    __config__=ConfigDict(strict=True, extra="allow", allow_inf_nan=False),
    **{flag: (kind | None, None) for kind, flags in _FLAG_TYPES.items() for flag in flags.split()},
)


def read_generation_config(source: Path) -> tuple[GenerationConfig, str | None]:
    """The checkpoint's own generation settings, and a sentence on the invalid ones, which are left out."""
    config, dropped = keep_valid_flags(read_optional_json(source / "generation_config.json"))
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
    # Without the private notes of transformers and what was not set.
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
