"""Projectors with the interface of `DeltaLlavaProjector`: (features, levels, scale factor) to (B, V, hidden size)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from transformers_delta_llava import DeltaLlavaConfig


class MLPProjector(nn.Module):
    """LLaVA-1.5: Linear, GELU, Linear on every patch of one level; no reduction, whatever the scale factor."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        self.mlp = _mlp(width, hidden)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def forward(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], scale_factor: int | None = None
    ) -> torch.Tensor:
        """(B, N, C) to (B, N, H)."""
        return self.mlp(features)


class AveragePoolingProjector(MLPProjector):
    """The mean of each s x s cell of one level, then the same MLP."""

    def forward(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], scale_factor: int | None = None
    ) -> torch.Tensor:
        """(B, N, C) to (B, N / s^2, H)."""
        assert scale_factor is not None
        return self.mlp(F.avg_pool2d(_to_map(features), scale_factor).flatten(2).transpose(1, 2))


class TokenPackerStyleProjector(MLPProjector):
    """After TokenPacker (Li et al., arXiv 2407.02392): coarse queries, each fed from the fine patches under it.

    Queries are one level, resized bilinearly to the coarse grid; keys and values are all levels side by side. Each goes
    through an MLP and a LayerNorm. A query attends to the s x s patches that it stands for and to no others
    (region-to-point injection); an MLP maps the result to the language model's width. The attention is PyTorch's
    multi-head attention with one head per 128 channels, as in the Delta projector beside it.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        width, levels = config.vision_config.hidden_size, len(config.vision_feature_levels)
        self.query, self.key, self.value = (
            nn.Sequential(_mlp(inputs, width), nn.LayerNorm(width))
            for inputs in (width, levels * width, levels * width)
        )
        self.attention = nn.MultiheadAttention(width, config.num_window_attention_heads, batch_first=True)

    def forward(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], scale_factor: int | None = None
    ) -> torch.Tensor:
        """(B, N, C) and levels of that shape to (B, N / s^2, H)."""
        assert scale_factor is not None
        side = math.isqrt(features.shape[1]) // scale_factor
        coarse = F.interpolate(_to_map(features), (side, side), mode="bilinear", align_corners=False)
        query = self.query(coarse.flatten(2).transpose(1, 2))
        memory = torch.cat(list(levels), dim=-1)
        key, value = (_cells(project(memory), scale_factor) for project in (self.key, self.value))
        attended, _ = self.attention(query.flatten(0, 1).unsqueeze(1), key, value, need_weights=False)
        return self.mlp(attended.reshape(query.shape))


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def _to_map(tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, C) in row-major order to (B, C, side, side)."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _cells(tokens: torch.Tensor, scale_factor: int) -> torch.Tensor:
    """(B, N, C) to (B * N / s^2, s^2, C): the patches of each cell, cells in row-major order."""
    side = math.isqrt(tokens.shape[1]) // scale_factor
    grid = tokens.unflatten(1, (side, scale_factor, side, scale_factor))
    return grid.transpose(2, 3).flatten(3, 4).flatten(0, 2)
