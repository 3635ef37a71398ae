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

    @property
    def output_map(self) -> nn.Module:
        """The last linear map, which `calibrate_projector` sets."""
        return self.mlp[-1]

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
    multi-head attention with one head per 128 channels, as in the Delta projector.
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


class PixelShuffleProjector(MLPProjector):
    """After InternVL (arXiv 2404.16821): the s x s patches of a cell side by side, then the MLP; one fixed s."""

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        self.mlp = _mlp(config.scale_factor**2 * width, hidden)

    def forward(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], scale_factor: int | None = None
    ) -> torch.Tensor:
        """(B, N, C) to (B, N / s^2, H)."""
        assert scale_factor is not None
        cells = _cells(features, scale_factor).flatten(1)
        return self.mlp(cells.unflatten(0, (len(features), -1)))


class CAbstractorStyleProjector(MLPProjector):
    """After Honeybee's C-Abstractor (Cha et al., arXiv 2312.06742): residual convolutions with squeeze and excitation,
    adaptive average pooling to the coarse grid, as many blocks again, then the MLP."""

    def __init__(self, config: DeltaLlavaConfig, depth: int = 3):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.before, self.after = (nn.Sequential(*(_ConvBlock(width) for _ in range(depth))) for _ in range(2))

    def forward(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], scale_factor: int | None = None
    ) -> torch.Tensor:
        """(B, N, C) to (B, N / s^2, H)."""
        assert scale_factor is not None
        fine = self.before(_to_map(features))
        coarse = F.adaptive_avg_pool2d(fine, fine.shape[-1] // scale_factor)
        return self.mlp(self.after(coarse).flatten(2).transpose(1, 2))


class ResamplerProjector(MLPProjector):
    """A query resampler (Flamingo, arXiv 2204.14198; Q-Former): learned queries attend to all patches, layer by layer."""

    def __init__(self, config: DeltaLlavaConfig, depth: int = 2):
        super().__init__(config)
        width, heads = config.vision_config.hidden_size, config.num_window_attention_heads
        self.queries = nn.Parameter(torch.randn(max(config.visual_token_budgets), width) * width**-0.5)
        self.place = nn.Parameter(torch.randn(max(config.visual_token_budgets), width) * 0.02)  # of the patches
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], scale_factor: int | None = None
    ) -> torch.Tensor:
        """(B, N, C) to (B, N / s^2, H): the first N / s^2 queries."""
        assert scale_factor is not None
        hidden = self.queries[: features.shape[1] // scale_factor**2].expand(len(features), -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, features + self.place)
        return self.mlp(self.norm(hidden))


class _ConvBlock(nn.Module):
    """Residual bottleneck: 1 x 1, grouped 3 x 3, squeeze and excitation, 1 x 1."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, width, 1), nn.GroupNorm(1, width), nn.SiLU()),
            *(nn.Conv2d(width, width, 3, padding=1, groups=width // 32), nn.GroupNorm(1, width), nn.SiLU()),
        )
        self.gate = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width // 4, 1), nn.SiLU()),
            *(nn.Conv2d(width // 4, width, 1), nn.Sigmoid()),
        )
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.body(hidden)
        return hidden + self.out(inner * self.gate(inner))


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
