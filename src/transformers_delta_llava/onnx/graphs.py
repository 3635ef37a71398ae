"""The three graphs of an ONNX export, traced from a model.

Names of inputs and outputs are those of transformers.js and Optimum. Floats that enter or leave a graph are float32, except the
cache, which has the dtype of the model.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache

from ..modeling import CACHE_NAME, DeltaLlavaForConditionalGeneration


OPSET = 21
# The name under which transformers finds `grouped_attention`.
_ATTENTION = "delta_llava_onnx"


class VisionEncoder(nn.Module):
    """`pixel_values` (images, 3, height, width) to `image_features` (images, visual tokens, hidden_size)."""

    def __init__(self, model: DeltaLlavaForConditionalGeneration, num_visual_tokens: int):
        super().__init__()
        self.model = model.model
        self.scale_factor = model.config.scale_factor_for(num_visual_tokens)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        projector = self.model.multi_modal_projector
        features = self.model.get_patch_features(pixel_values.to(projector.dtype))
        tokens = projector(features.stream, features.levels, self.scale_factor)
        embed_scale = getattr(self.model.get_input_embeddings(), "embed_scale", None)
        return (tokens if embed_scale is None else tokens * embed_scale.to(tokens)).float()


class EmbedTokens(nn.Module):
    """`input_ids` (batch, sequence) to `inputs_embeds` (batch, sequence, hidden_size)."""

    def __init__(self, model: DeltaLlavaForConditionalGeneration):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids).float()


class Decoder(nn.Module):
    """The language model: `inputs_embeds` (batch, sequence, hidden_size), `attention_mask` (batch, past + sequence),
    `position_ids` (batch, sequence) and the cache, a key and a value (batch, key heads, past, head size) for each layer,
    where past may be 0.

    Returns `logits` (batch, 1, vocabulary) of the last position, and the cache with the new keys and values.
    """

    def __init__(self, model: DeltaLlavaForConditionalGeneration):
        super().__init__()
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head
        self.config = model.config.text_config

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = GrowingCache(past_key_values)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds.to(self.lm_head.weight.dtype),
            attention_mask=self._masks(attention_mask, inputs_embeds.shape[1]),
            position_ids=position_ids,
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -1:])
        softcap = getattr(self.config, "final_logit_softcapping", None)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.float(), *cache.tensors

    def _masks(self, attention_mask: torch.Tensor, length: int) -> Any:
        """4-D masks as transformers' decoders accept them: one, or one per kind of layer."""
        window = getattr(self.config, "sliding_window", None)
        layer_types = getattr(self.config, "layer_types", None)
        dtype = self.lm_head.weight.dtype
        if layer_types is None:  # Mistral and Phi-3 have one window for all layers
            return causal_mask(attention_mask, length, dtype, window)
        return {
            kind: causal_mask(attention_mask, length, dtype, window if kind == "sliding_attention" else None)
            for kind in set(layer_types)
        }


class GrowingCache(DynamicCache):
    """A cache that only appends: no branch on its length, which a traced graph cannot have."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        super().__init__()
        self.tensors = list(tensors)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pair = slice(2 * layer_idx, 2 * layer_idx + 2)
        self.tensors[pair] = [
            torch.cat([past, new], dim=-2) for past, new in zip(self.tensors[pair], (key_states, value_states))
        ]
        key, value = self.tensors[pair]
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.tensors[2 * layer_idx].shape[-2])


def causal_mask(
    attention_mask: torch.Tensor, length: int, dtype: torch.dtype, window: int | None = None
) -> torch.Tensor:
    """(batch, 1, length, keys), to be added to scores, from an `attention_mask` (batch, keys) whose last `length` keys
    belong to the queries; `window` is how many positions a query sees, its own among them."""
    positions = torch.arange(attention_mask.shape[1])
    queries = positions[-length:, None]
    seen = positions <= queries
    if window is not None:
        seen = seen & (positions > queries - window)
    seen = seen & attention_mask[:, None, None, :].bool()
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in which the query heads of a group share their keys and values, which are not copied for each of them.

    Queries (batch, heads, sequence, d), keys and values (batch, key heads, keys, d); returns (batch, sequence, heads, d).
    """
    groups = query.unflatten(1, (key.shape[1], -1))  # (batch, key heads, group, sequence, d)
    scores = (groups * scaling) @ key[:, :, None].transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + attention_mask[:, :, None]).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, grouped_attention)


@contextmanager
def use_grouped_attention(model: DeltaLlavaForConditionalGeneration) -> Iterator[None]:
    """The language model with `grouped_attention`; afterwards as it was."""
    config = model.model.language_model.config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def trace_vision_encoder(model: DeltaLlavaForConditionalGeneration, num_visual_tokens: int) -> ir.Model:
    """The graph of `VisionEncoder` for one number of visual tokens."""
    side = model.config.vision_config.image_size
    inputs = {"pixel_values": torch.zeros(2, 3, side, side)}
    axes = {"pixel_values": {0: "batch_size"}}
    return _trace(VisionEncoder(model, num_visual_tokens), inputs, axes, ["pixel_values"], ["image_features"])


def trace_embed_tokens(model: DeltaLlavaForConditionalGeneration) -> ir.Model:
    """The graph of `EmbedTokens`."""
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    axes = {"input_ids": {0: "batch_size", 1: "sequence_length"}}
    return _trace(EmbedTokens(model), inputs, axes, ["input_ids"], ["inputs_embeds"])


def trace_decoder(model: DeltaLlavaForConditionalGeneration) -> ir.Model:
    """The graph of `Decoder`."""
    text = model.config.text_config
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    batch, past, length, tensors = 2, 5, 3, 2 * text.num_hidden_layers
    cache_shape = (batch, text.num_key_value_heads, past, size)
    inputs = {
        "inputs_embeds": torch.zeros(batch, length, text.hidden_size),
        "attention_mask": torch.ones(batch, past + length, dtype=torch.long),
        "position_ids": torch.arange(past, past + length).repeat(batch, 1),
        "past_key_values": [torch.zeros(cache_shape, dtype=model.dtype) for _ in range(tensors)],
    }
    axes = {
        "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": {0: "batch_size", 1: "sequence_length"},
        "past_key_values": [{0: "batch_size", 2: "past_sequence_length"}] * tensors,
    }
    cache = [f"{layer}.{part}" for layer in range(text.num_hidden_layers) for part in ("key", "value")]
    names = [*list(inputs)[:3], *(f"past_key_values.{name}" for name in cache)]
    with use_grouped_attention(model):
        return _trace(Decoder(model), inputs, axes, names, ["logits", *(f"present.{name}" for name in cache)])


def _trace(
    module: nn.Module, inputs: dict[str, Any], axes: dict[str, Any], names: list[str], outputs: list[str]
) -> ir.Model:
    """`axes` names the dimensions that may have any length."""
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=inputs,
            dynamic_shapes=axes,
            input_names=names,
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and the exporter's libraries log and warn about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
