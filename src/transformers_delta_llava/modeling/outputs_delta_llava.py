"""Outputs of the models, and the name of the cache in them."""

from dataclasses import dataclass, fields

import torch
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput


# transformers 5.24 renamed `past_key_values` to `cache`, as an argument and as a field of outputs.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


@dataclass
class DeltaLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of [`DeltaLlavaModel`].

    The fields of transformers' own class, `cache` or `past_key_values` as the installed version names it, and:

    image_hidden_states: (visual tokens of the whole batch, hidden_size), what entered the language model.
    image_outputs: what `get_image_features` returned.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return nested_tuple(self)


@dataclass
class DeltaLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of [`DeltaLlavaForConditionalGeneration`], with the two fields of the base model's."""

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return nested_tuple(self)


def nested_tuple(output: ModelOutput) -> tuple:
    """The values of an output as a tuple, nested outputs included."""
    return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in output.values())


def pick_cache(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Cache | None]:
    """The cache, by its argument's name in the installed transformers.

    Raises:
        ValueError: if it was given under both names.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("You cannot specify both cache and past_key_values: they are two names of one argument.")
    return {CACHE_NAME: past_key_values if cache is None else cache}
