"""The Delta-LLaVA projectors: patch features of a vision tower in, a few visual tokens out.

Shapes: B images, N = G * G patches in row-major order, C the tower's width, s the scale factor, g = G / s the side of
the query grid, V = g * g visual tokens, H the language model's width. Equation numbers are the paper's (arXiv 2512.18910).
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from .configuration_delta_llava import DeltaLlavaConfig
from .delta_projection_delta_llava import DeltaProjection, MemoryProjection, projection_specs
from .projector_layers_delta_llava import (
    FeedForward,
    PaperTransformerBlock,
    PositionEmbedding2D,
    ProjectedWindowAttention,
    Refinement,
    ReleasedTransformerBlock,
    WindowAttention,
    concat_levels,
    resize,
    to_windows,
)


class DeltaLlavaProjector(nn.Module):
    """Visual tokens for the language model from the tower's patch features.

    `DeltaLlavaProjector(config)` is a [`ReleasedProjector`] or a [`PaperProjector`], by `config.projector_layout`. No
    parameter of either depends on the scale factor.
    """

    def __new__(cls, config: DeltaLlavaConfig | None = None) -> "DeltaLlavaProjector":
        # Without a config in copies and pickles, which name the class that they want.
        if cls is DeltaLlavaProjector and config is not None:
            cls = ReleasedProjector if config.projector_layout == "released" else PaperProjector
        return super().__new__(cls)

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        self.config = config
        self.specs = projection_specs(
            config.projector_layout,
            config.delta_sharing,
            len(config.vision_feature_levels),
            config.vision_config.hidden_size,
        )
        self.position = PositionEmbedding2D(config.grid_size, config.vision_config.hidden_size)
        self.block: nn.Module | None = None

    def delta_projections(self) -> dict[str, DeltaProjection]:
        """The DeltaProjections by name."""
        return {name: getattr(self, name) for name in self.specs}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base weights, which quantisers do not touch."""
        return getattr(self, next(iter(self.specs))).weight.dtype

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
            ValueError: if N is not a square grid, s does not divide it, or the number of levels is wrong.
        """
        scale_factor = self.config.scale_factor if scale_factor is None else scale_factor
        side = math.isqrt(features.shape[1])
        if side * side != features.shape[1]:
            raise ValueError(
                f"The projector needs a square grid of patches, and got {features.shape[1]}; drop the class token "
                "(vision_feature_select_strategy='default') or use square images."
            )
        if len(levels) != len(self.config.vision_feature_levels):
            raise ValueError(
                "The projector needs one tensor for each of vision_feature_levels="
                f"{self.config.vision_feature_levels}, and got {len(levels)}."
            )
        if side % (scale_factor * self.config.projector_window_size):
            raise ValueError(
                f"scale_factor={scale_factor}: it does not divide the {side} x {side} patch grid into whole windows."
            )
        return self.project(features, levels, side // scale_factor, scale_factor)

    @property
    def output_map(self) -> nn.Linear:
        """The last map, to the language model's width."""
        raise NotImplementedError

    def project(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], grid_size: int, scale_factor: int
    ) -> torch.Tensor:
        """What `forward` returns, from inputs that it has checked; `grid_size` is the side of the query grid."""
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
        self.query = DeltaProjection(self.specs["query"], rank, act)
        self.key = MemoryProjection(self.specs["key"], rank, act)
        self.value = MemoryProjection(self.specs["value"], rank, act)
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
    """Equations (3) to (11), taken literally.

    Queries, keys and values have one base each (or one for all three, `delta_sharing="all"`), with a rank-r update per
    level.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__(config)
        rank = config.delta_rank if config.use_delta_projection else 0
        width, hidden_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.refine = Refinement(config)
        for name, spec in self.specs.items():
            self.add_module(name, DeltaProjection(spec, rank))
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
        query = query + self.position(grid_size, query.dtype)  # (3)
        query = self._project_role("query", query)  # (4)
        if self.block is not None:
            query = self.block(query)  # (6)
        size = self.config.projector_window_size * scale_factor
        key, value = (  # (7), (8)
            concat_levels([to_windows(self._project_role(role, level, i), size) for i, level in enumerate(levels)])
            for role in ("key", "value")
        )
        attended = self.window_attention(query, key, value)  # (9), (10)
        refined = attended + self.feed_forward(self.feed_forward_norm(attended))  # (11)
        return self.out_proj(refined)

    def _project_role(self, role: str, hidden_states: torch.Tensor, *level: int) -> torch.Tensor:
        shared = self.config.delta_sharing == "all"
        name, update = ("qkv", ("qkv".index(role[0]), *level)) if shared else (role, level)
        return getattr(self, name)(hidden_states, update)
