# Copyright 2026 The transformers-delta-llava authors.
# SPDX-License-Identifier: Apache-2.0
"""The Delta-LLaVA projectors: patch features of a vision tower in, a few visual tokens out.

Shapes: B images, N = G * G patches in row-major order, C the tower's width, s the scale factor, g = G / s the side of the
query grid, V = g * g visual tokens, H the language model's width. Section and equation numbers are the paper's (arXiv
2512.18910). Every block works on tokens (B, tokens, channels), so a 1 x 1 convolution is an `nn.Linear`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_delta_llava import DeltaLlavaConfig
from .deltas_delta_llava import DeltaProjection, MemoryProjection


class DeltaLlavaProjector(nn.Module):
    """Visual tokens for the language model from the tower's patch features; see `PROJECTORS` for the two layouts.

    No parameter depends on the scale factor.
    """

    query: DeltaProjection
    key: DeltaProjection
    value: DeltaProjection

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        self.config = config
        self.position = PositionEmbedding2D(config.grid_size, config.vision_config.hidden_size)
        self.block: nn.Module | None = None

    def delta_projections(self) -> dict[str, DeltaProjection]:
        """The DeltaProjections by name."""
        return {"query": self.query, "key": self.key, "value": self.value}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base weights, which quantisers do not touch."""
        return self.query.weight.dtype

    @property
    def output_map(self) -> nn.Linear:
        """The last map, to the language model's width."""
        raise NotImplementedError

    def forward(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], scale_factor: int | None = None
    ) -> torch.Tensor:
        """
        Args:
            features: (B, N, C), the single-level stream that makes the queries, without the class token.
            levels: one (B, N, C) per entry of `config.vision_feature_levels`, in that order, for keys and values.
            scale_factor: spatial reduction s; the config's by default.

        Returns:
            (B, V, H) visual tokens in row-major order, V = N / s^2, in the dtype of the projector.

        Raises:
            ValueError: N is not a square grid, or s does not divide it.
        """
        scale_factor = self.config.scale_factor if scale_factor is None else scale_factor
        side = math.isqrt(features.shape[1])
        if side * side != features.shape[1] or side % scale_factor:
            raise ValueError(
                f"scale_factor={scale_factor} does not divide {features.shape[1]} patches into a square grid"
            )
        return self.project(features, levels, side // scale_factor, scale_factor)

    def project(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], grid_size: int, scale_factor: int
    ) -> torch.Tensor:
        """What `forward` returns; `grid_size` is the side of the query grid."""
        raise NotImplementedError


class ReleasedProjector(DeltaLlavaProjector):
    """What the authors' code computes.

    Interpolate, refine (one block), add positions, project queries; keys and values from all levels side by side; window
    attention with its own projections; feed-forward to the language model's width.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        rank, act = config.delta_rank if config.use_delta_projection else 0, config.projector_hidden_act
        width, hidden_size = config.vision_config.hidden_size, config.text_config.hidden_size
        if config.use_transformer_block:
            self.block = ReleasedTransformerBlock(config)
        memory_width = width * len(config.vision_feature_levels)
        self.query = DeltaProjection(width, width, rank, hidden_act=act)
        self.key = MemoryProjection(memory_width, width, rank, hidden_act=act)
        self.value = MemoryProjection(memory_width, width, rank, hidden_act=act)
        self.window_attention = ProjectedWindowAttention(config)
        self.feed_forward = FeedForward(width, hidden_size, hidden_size, act)

    @property
    def output_map(self) -> nn.Linear:
        return self.feed_forward.fc2

    def project(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], grid_size: int, scale_factor: int
    ) -> torch.Tensor:
        if torch.is_grad_enabled():
            # The base's gradient comes in one piece then, which saves more than this copy costs.
            levels = [torch.cat(list(levels), dim=-1)]
        else:
            levels = [level.contiguous() for level in levels]
        value = to_windows(self.value(levels), scale_factor)
        if scale_factor == 1 and not torch.is_grad_enabled():
            # One patch per window, so nothing reaches the output but values. Training needs the zero gradients of the
            # rest, because DDP waits for every parameter.
            return self.feed_forward(self.window_attention(None, None, value))
        key, query = to_windows(self.key(levels), scale_factor), resize(features, grid_size)
        if self.block is not None:
            query = self.block(query)
        query = self.query(query + self.position(grid_size, query.dtype))
        return self.feed_forward(self.window_attention(query, key, value))


class PaperProjector(DeltaLlavaProjector):
    """Equations (3) to (11), taken literally: queries, keys and values have one base each, with a rank-r update per level.

    Equation (4) gives the query no level, so its updates add up.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        rank, levels = config.delta_rank if config.use_delta_projection else 0, len(config.vision_feature_levels)
        width, hidden_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.refine = Refinement(config)
        self.query = DeltaProjection(width, width, rank, levels, sum_levels=True)
        self.key = DeltaProjection(width, width, rank, levels)
        self.value = DeltaProjection(width, width, rank, levels)
        if config.use_transformer_block:
            self.block = PaperTransformerBlock(config)
        self.window_attention = WindowAttention(config)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden_size, width, config.projector_hidden_act)
        self.out_proj = nn.Linear(width, hidden_size)

    @property
    def output_map(self) -> nn.Linear:
        return self.out_proj

    def project(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], grid_size: int, scale_factor: int
    ) -> torch.Tensor:
        query = self.refine(resize(features, grid_size))
        query = self.query(query + self.position(grid_size, query.dtype))  # (3), (4)
        if self.block is not None:
            query = self.block(query)  # (6)
        key, value = (  # (7), (8)
            torch.cat([to_windows(projection(level, i), scale_factor) for i, level in enumerate(levels)], dim=-2)
            for projection in (self.key, self.value)
        )
        attended = self.window_attention(query, key, value)  # (9), (10)
        refined = attended + self.feed_forward(self.feed_forward_norm(attended))  # (11)
        return self.out_proj(refined)


PROJECTORS: dict[str, type[DeltaLlavaProjector]] = {"released": ReleasedProjector, "paper": PaperProjector}


class StochasticDepth(nn.Module):
    """Drops a residual branch per sample in training, and rescales the survivors."""

    def __init__(self, drop_rate: float):
        super().__init__()
        self.drop_rate = drop_rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_rate == 0.0:
            return branch
        keep = 1.0 - self.drop_rate
        mask = branch.new_empty(branch.shape[0], *[1] * (branch.dim() - 1)).bernoulli_(keep)
        return branch * mask / keep


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation (2) for (B, heads, tokens, d); returns (B, tokens, heads, d) and the weights."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class EfficientMultiHeadSelfAttention(nn.Module):
    """EMHSA, section 4.1 and equation (2), at spatial reduction 1: pre-normalised global attention over the query grid."""

    def __init__(self, config: DeltaLlavaConfig, channels: int):
        super().__init__()
        self.config = config.vision_config  # attention over patches follows the tower's attention implementation
        self.head_dim = config.projector_head_dim
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, V, channels) to the same shape; the residual is the caller's."""
        hidden_states = self.norm(hidden_states)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attention_interface(
            self, query, key, value, None, scaling=self.scaling, dropout=0.0, is_causal=self.is_causal
        )
        return self.out_proj(attended.flatten(2))


class MultiHeadConvolutionalAttention(nn.Module):
    """MHCA, section 4.1: grouped 3 x 3 convolution, LayerNorm, ReLU, and a map that merges the groups."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.group_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // head_dim, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.out_proj = nn.Linear(channels, channels, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, V, channels) to the same shape; the residual is the caller's."""
        mixed = to_tokens(self.group_conv(to_map(hidden_states)))
        return self.out_proj(F.relu(self.norm(mixed)))


class FeedForward(nn.Module):
    """Two linear maps with an activation between them: the MLP of the block, and `W2 sigma(W1 x)` of equation (11)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, hidden_act: str):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = ACT2FN[hidden_act]
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class ReleasedTransformerBlock(nn.Module):
    """The refinement block of the released code: EMHSA on some channels, MHCA on the rest, then an MLP on both."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        channels, head_dim = config.vision_config.hidden_size, config.projector_head_dim
        heads = round(channels * config.projector_mix_ratio / head_dim)
        attention_channels = head_dim * min(max(heads, 1), channels // head_dim - 1)
        local_channels = channels - attention_channels
        drop, mix = config.projector_drop_path, config.projector_mix_ratio

        self.stem = nn.Linear(channels, attention_channels, bias=False)
        self.attention = None
        if config.use_emhsa:
            self.attention_norm = nn.LayerNorm(attention_channels)
            self.attention = EfficientMultiHeadSelfAttention(config, attention_channels)
            self.attention_drop = StochasticDepth(drop * mix)
        self.local_proj = nn.Linear(attention_channels, local_channels, bias=False)
        self.conv_attention = MultiHeadConvolutionalAttention(local_channels, head_dim)
        self.conv_drop = StochasticDepth(drop * (1 - mix))
        self.mlp = FeedForward(channels, int(channels * config.projector_mlp_ratio), channels, "relu")
        self.mlp_drop = StochasticDepth(drop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, V, C) to (B, V, C)."""
        attended = self.stem(hidden_states)
        if self.attention is not None:
            attended = attended + self.attention_drop(self.attention(self.attention_norm(attended)))
        local = self.local_proj(attended)
        local = local + self.conv_drop(self.conv_attention(local))
        hidden_states = torch.cat([attended, local], dim=-1)
        return hidden_states + self.mlp_drop(self.mlp(hidden_states))


class PaperTransformerBlock(nn.Module):
    """NTB of equation (6), the cascade EMHSA, MHCA, MLP, each at full width with a residual."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        channels = config.vision_config.hidden_size
        self.attention = EfficientMultiHeadSelfAttention(config, channels) if config.use_emhsa else None
        self.conv_attention = MultiHeadConvolutionalAttention(channels, config.projector_head_dim)
        self.mlp = FeedForward(channels, int(channels * config.projector_mlp_ratio), channels, "relu")
        self.drop = StochasticDepth(config.projector_drop_path)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, V, C) to (B, V, C)."""
        if self.attention is not None:
            hidden_states = hidden_states + self.drop(self.attention(hidden_states))
        hidden_states = hidden_states + self.drop(self.conv_attention(hidden_states))
        return hidden_states + self.drop(self.mlp(hidden_states))


class Refinement(nn.Module):
    """Refine of equation (3): MHCA, then EMHSA, in the order of section 4.1, each with a residual."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        channels = config.vision_config.hidden_size
        self.conv_attention = MultiHeadConvolutionalAttention(channels, config.projector_head_dim)
        self.attention = EfficientMultiHeadSelfAttention(config, channels) if config.use_emhsa else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, V, C) to (B, V, C)."""
        hidden_states = hidden_states + self.conv_attention(hidden_states)
        if self.attention is not None:
            hidden_states = hidden_states + self.attention(hidden_states)
        return hidden_states


class WindowAttention(nn.Module):
    """Windowed cross-attention, equations (9) and (10), with windows of one query, as in the released code."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        self.num_heads = config.num_window_attention_heads

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries (B, V, C), and keys and values of each window (B, V, tokens, C), to (B, V, C)."""
        # (B, V, tokens, C) to (B * V, heads, tokens, C / heads)
        heads = (
            tokens.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (query.unsqueeze(2), key, value)
        )
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(1).unflatten(0, query.shape[:2])


class ProjectedWindowAttention(nn.Module):
    """Window attention of the released code: windows of one query, and projections of query, key, value and output.

    The projections of keys and values move to the queries' side: with `W_k` and `W_v` of one head, `q . (W_k k + b_k)` is
    `(W_k^T q) . k` plus what is the same for all keys, which a softmax ignores; and `sum a (W_v v + b_v)` is
    `W_v (sum a v) + b_v`, as the weights `a` sum to one. There is one query for s * s patches, so that is s * s times
    less work. Every head then has a query as wide as the keys, and all share one set of keys and values.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        channels = config.vision_config.hidden_size
        self.num_heads = config.num_window_attention_heads
        # Packed rows: query, key, value. Raw parameters, because their parts enter algebra of their own.
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform on the packed matrix and zero biases, as in the released code."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def forward(self, query: torch.Tensor | None, key: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        """Queries (B, V, C), and keys and values of each window (B, V, tokens, C), to (B, V, C).

        Where a window holds one patch, that has all the weight: query and key do not matter, and may be `None`.
        (A method of its own for that case would bypass the hooks that load offloaded weights.)
        """
        (wq, wk, wv), (bq, _, bv) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        if query is None or key is None:
            return self.out_proj(F.linear(value.flatten(1, 2), wv, bv))
        heads = (self.num_heads, -1)
        # All windows of all images are one batch: (windows, heads, d).
        windows = query.shape[:2]
        query = F.linear(query, wq, bq).flatten(0, 1).unflatten(-1, heads)
        query = query * query.shape[-1] ** -0.5
        # W_k^T q, one product per head: (heads, windows, d) @ (heads, d, C). Back in (windows, heads, C), the heads
        # take the place of a sequence of queries, and all of them meet the same keys in one batched product.
        wide_query = (query.transpose(0, 1) @ wk.unflatten(0, heads)).transpose(0, 1)
        scores = wide_query @ key.flatten(0, 1).transpose(1, 2)
        del wide_query  # as large as what comes next: with scores this small no fused kernel would save memory
        attended = scores.softmax(dim=-1) @ value.flatten(0, 1)  # sum a v: (windows, heads, C)
        attended = attended.transpose(0, 1) @ wv.unflatten(0, heads).transpose(1, 2)  # W_v (sum a v), head by head
        attended = attended.transpose(0, 1).flatten(1) + bv
        return self.out_proj(attended.unflatten(0, windows))


class PositionEmbedding2D(nn.Module):
    """Pos2D of equation (3): a fixed table for the tower's full grid, resized to the query grid (released code).

    Not in any checkpoint.
    """

    def __init__(self, grid_size: int, channels: int):
        super().__init__()
        self.grid_size, self.channels = grid_size, channels
        self.register_buffer("table", self.make_table(), persistent=False)

    def make_table(self) -> torch.Tensor:
        """(G * G, C) in float32: [sin(column w), cos(column w), sin(row w), cos(row w)] with w = 10000^(-4k/C)."""
        quarter = self.channels // 4
        frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
        angle = torch.arange(self.grid_size, dtype=torch.float64, device="cpu")[:, None] * frequency
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1).float()
        side = (self.grid_size, self.grid_size, -1)
        return torch.cat([waves[None].expand(side), waves[:, None].expand(side)], dim=-1).flatten(0, 1)

    def reset_parameters(self) -> None:
        """Fills the table; a model that is built on the meta device has to do it again."""
        self.table.copy_(self.make_table())

    def forward(self, grid_size: int, dtype: torch.dtype) -> torch.Tensor:
        """The table (g * g, C) of a g x g grid. Half precision rounds before resizing, as in the released code."""
        table = self.table.to(dtype)
        if grid_size == self.grid_size:
            return table
        # One half of the table depends on the column only, the other in the same way on the row: resize one line.
        line = table[: self.grid_size, : self.channels // 2].float().T[None, :, None]
        line = F.interpolate(line, (1, grid_size), mode="bicubic", align_corners=False)[0, :, 0].T.to(dtype)
        side = (grid_size, grid_size, -1)
        return torch.cat([line[None].expand(side), line[:, None].expand(side)], dim=-1).flatten(0, 1)


def resize(tokens: torch.Tensor, grid_size: int) -> torch.Tensor:
    """(B, N, C) tokens of a grid to (B, grid_size^2, C), bilinear, without antialiasing."""
    return to_tokens(F.interpolate(to_map(tokens), (grid_size, grid_size), mode="bilinear", align_corners=False))


def to_map(tokens: torch.Tensor) -> torch.Tensor:
    """(B, g * g, C) tokens in row-major order to a (B, C, g, g) map."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    """(B, C, g, g) map to (B, g * g, C) tokens in row-major order, contiguous: vLLM's linear maps on CPU want that."""
    return feature_map.flatten(2).transpose(1, 2).contiguous()


def to_windows(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """(B, g * g, C) tokens to (B, windows, size * size, C), windows and their tokens in row-major order."""
    side = math.isqrt(tokens.shape[1]) // size
    return tokens.unflatten(1, (side, size, side, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
