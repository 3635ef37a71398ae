# Copyright 2026 The transformers-delta-llava authors.
# SPDX-License-Identifier: Apache-2.0
"""Running a vision tower up to the deepest hidden state that is needed."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_delta_llava import SELECT_STRATEGIES


# DINOv2's attention in files, and in memory of newer releases of transformers.
SAVED_ATTENTION = {
    **{f".attention.attention.{role}.": f".attention.{role[0]}_proj." for role in ("query", "key", "value")},
    ".attention.output.dense.": ".attention.o_proj.",
}


class TowerCalls(NamedTuple):
    """How the parts of a tower are called, which differs between towers and releases of transformers."""

    takes_interpolate: bool  # CLIP's and SigLIP's embeddings; DINOv2's always fit their positions to the image
    takes_mask: bool  # the layers; DINOv2's do from some release on


def find_tower_calls(tower: nn.Module) -> TowerCalls | None:
    """How to run a tower layer by layer; `None` for other towers than CLIP, SigLIP and DINOv2, which are run as a whole."""
    layers, embeddings = _layers(tower), getattr(tower, "embeddings", None)
    if tower.config.model_type not in SELECT_STRATEGIES or not len(layers) or embeddings is None:
        return None
    parameters = list(inspect.signature(layers[0].forward).parameters)
    takes_mask = parameters[:2] == ["hidden_states", "attention_mask"]
    if not takes_mask and parameters != ["hidden_states"]:
        return None
    return TowerCalls("interpolate_pos_encoding" in inspect.signature(embeddings.forward).parameters, takes_mask)


def run_vision_tower(
    tower: nn.Module, pixel_values: torch.Tensor, indices: Sequence[int], calls: TowerCalls | None, **kwargs: Any
) -> tuple[BaseModelOutputWithPooling, Sequence[Any]]:
    """The tower's output, and a sequence with the wanted hidden states at their own indices.

    Layer by layer, the layers above the deepest wanted state are not computed, and no other state is kept. Callers that ask
    for all states or attentions get a full run.

    Args:
        tower: a vision model of transformers.
        pixel_values: (images, 3, height, width).
        indices: ascending; 0 is the embedding, `i` the output of layer `i`.
        calls: of `find_tower_calls`.
        kwargs: for the tower.
    """
    wants_states, wants_attentions = (
        kwargs.get(name) or getattr(tower.config, name, False)
        for name in ("output_hidden_states", "output_attentions")
    )
    if wants_states or wants_attentions or calls is None:
        outputs = tower(pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        states = outputs.hidden_states
        if not wants_states:
            outputs.hidden_states = None
        return outputs, states

    interpolate = {"interpolate_pos_encoding": kwargs.pop("interpolate_pos_encoding", False)}
    hidden_states = tower.embeddings(pixel_values, **(interpolate if calls.takes_interpolate else {}))
    if hasattr(tower, "pre_layrnorm"):
        hidden_states = tower.pre_layrnorm(hidden_states)
    kept: list[torch.Tensor | None] = [None] * (tower.config.num_hidden_layers + 1)
    for index in range(indices[-1] + 1):
        if index > 0:
            layer = _layers(tower)[index - 1]
            hidden_states = layer(hidden_states, None, **kwargs) if calls.takes_mask else layer(hidden_states)
        if index in indices:
            kept[index] = hidden_states
    return BaseModelOutputWithPooling(last_hidden_state=hidden_states), kept


def _layers(tower: nn.Module) -> Any:
    """The layers, as CLIP and SigLIP or as DINOv2 name them; empty where there are none."""
    encoder = getattr(tower, "encoder", None)
    return getattr(encoder, "layers", None) or getattr(encoder, "layer", None) or []


def rename_saved_tower(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let `load_state_dict` take saved files, as transformers' Trainer does when it resumes.

    Files keep the names of older releases, `vision_tower.vision_model.*` and DINOv2's attention, which only
    `from_pretrained` translates.
    """
    own, tower = {name for name, _ in module.vision_tower.named_parameters()}, f"{prefix}vision_tower."
    for name in [name for name in state_dict if name.startswith(tower) and name.removeprefix(tower) not in own]:
        here = name.removeprefix(tower).removeprefix("vision_model.")
        for saved, renamed in SAVED_ATTENTION.items():
            here = here.replace(saved, renamed)
        state_dict[tower + here] = state_dict.pop(name)
