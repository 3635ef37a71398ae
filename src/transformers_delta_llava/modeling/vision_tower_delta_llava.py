"""Running a vision tower up to the deepest hidden state that is needed."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_delta_llava import SELECT_STRATEGIES


def run_vision_tower(
    tower: nn.Module, pixel_values: torch.Tensor, indices: Sequence[int], by_layer: bool, **kwargs: Any
) -> tuple[BaseModelOutputWithPooling, Sequence[Any]]:
    """The tower's output, and a sequence with the wanted hidden states at their own indices.

    Layer by layer, the layers above the deepest state and the pooling head are not computed, and no other hidden state is
    kept. Callers that ask for all states or attentions get a full run.

    Args:
        tower: a vision model of transformers.
        pixel_values: (images, 3, height, width).
        indices: ascending; 0 is the embedding, `i` the output of layer `i`.
        by_layer: of `has_known_layers`.
        kwargs: as the tower takes them.
    """
    asked = {
        name: kwargs.get(name) or getattr(tower.config, name, False)
        for name in ("output_hidden_states", "output_attentions")
    }
    if any(asked.values()) or not by_layer:
        outputs = tower(pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        all_states = outputs.hidden_states
        if not asked["output_hidden_states"]:
            outputs.hidden_states = None
        return outputs, all_states

    states: list[torch.Tensor | None] = [None] * (tower.config.num_hidden_layers + 1)
    interpolate = kwargs.pop("interpolate_pos_encoding", False)
    hidden_states = tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate)
    if hasattr(tower, "pre_layrnorm"):
        hidden_states = tower.pre_layrnorm(hidden_states)
    for index, layer in enumerate([None, *tower.encoder.layers[: indices[-1]]]):
        if layer is not None:
            hidden_states = layer(hidden_states, None, **kwargs)
        if index in indices:
            states[index] = hidden_states
    return BaseModelOutputWithPooling(last_hidden_state=hidden_states), states


def has_known_layers(tower: nn.Module) -> bool:
    """Whether a tower can be run layer by layer: it has the parts, and its layers the signature, of CLIP and SigLIP.

    Other towers, and towers that a later transformers builds in another way, are run as a whole.
    """
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if tower.config.model_type not in SELECT_STRATEGIES or not layers or not hasattr(tower, "embeddings"):
        return False
    return list(inspect.signature(layers[0].forward).parameters)[:2] == ["hidden_states", "attention_mask"]


def rename_saved_tower(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let `load_state_dict` take saved files, as transformers' Trainer does when it resumes.

    Files keep the names of transformers 4, `vision_tower.vision_model.*`, which only `from_pretrained` translates.
    """
    saved, own = f"{prefix}vision_tower.vision_model.", f"{prefix}vision_tower."
    if hasattr(module.vision_tower, "vision_model"):
        return
    for name in [name for name in state_dict if name.startswith(saved)]:
        state_dict[own + name.removeprefix(saved)] = state_dict.pop(name)
