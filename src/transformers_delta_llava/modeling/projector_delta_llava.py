"""The Delta-LLaVA projector: patch features of a vision tower in, a few visual tokens out.

Shapes: B images, N = G * G patches in row-major order, C the tower's width, s the scale factor, g = G / s the side of
the query grid, V = g * g visual tokens, H the language model's width, r the rank. Section and equation numbers are the
paper's (arXiv 2512.18910). Every block works on tokens (B, tokens, channels), so a 1 x 1 convolution is an `nn.Linear`.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_delta_llava import DeltaLlavaConfig


class DeltaProjection(nn.Module):
    """A base matrix plus low-rank updates: `x @ (weight + (delta_u @ delta_v).T).T`, equation (4).

    The product `delta_u @ delta_v` is never formed: `x @ delta_u @ delta_v` costs less at these ranks.

    `updates` is the shape of the set of updates that share the base: `()` for one, `(L,)` for one per level. With
    `hidden_act` the map is followed by that activation and a LayerNorm, as in the released code; the paper has
    neither.

    Parameters: `weight` (out, in), `delta_u` (*updates, in, rank), `delta_v` (*updates, rank, out); the last two are
    `None` when `rank` is 0 (the ablation "No DeltaProj").

    Besides the deltas in use a projection can hold others by name, and the sums of base and update ("merged"); the
    models' `load_deltas`, `set_deltas` and `merge_deltas` see to that. Neither is in the state dict.
    """

    delta_u: nn.Parameter | None
    delta_v: nn.Parameter | None
    merged_weights: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        updates: tuple[int, ...] = (),
        hidden_act: str | None = None,
    ):
        super().__init__()
        # Raw parameters, not nn.Linear: engines and quantisers replace every nn.Linear.
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        if rank:
            self.delta_u = nn.Parameter(torch.empty(*updates, in_features, rank))
            self.delta_v = nn.Parameter(torch.empty(*updates, rank, out_features))
        else:
            self.register_parameter("delta_u", None)
            self.register_parameter("delta_v", None)
        self.act = ACT2FN[hidden_act] if hidden_act else nn.Identity()
        self.norm = nn.LayerNorm(out_features, eps=1e-6) if hidden_act else nn.Identity()
        self.active_deltas, self.active_rank = "default", rank
        self.held_deltas: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # the others, at their own ranks
        self.merged_updates: dict[tuple[int, ...], int] = {}
        self.register_buffer("merged_weights", None, persistent=False)
        self.register_load_state_dict_pre_hook(_unmerge)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal base, Xavier-uniform factors, as in the released code: the update does not start at 0."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        for factor in (self.delta_u, self.delta_v):
            if factor is not None:
                bound = math.sqrt(6 / sum(factor.shape[-2:]))
                nn.init.uniform_(factor, -bound, bound)

    def forward(self, hidden_states: torch.Tensor, update: tuple[int, ...] = ()) -> torch.Tensor:
        """(..., in) to (..., out). `update` picks one update; where it leaves several, their sum applies."""
        weight, factors = self.operands(update)
        projected = F.linear(hidden_states, weight)
        if factors is not None:
            projected = projected + hidden_states @ factors[0] @ factors[1]
        return self.norm(self.act(projected))

    def operands(self, update: tuple[int, ...] = ()) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """What the input is multiplied with: the base and the factors (in, r) and (r, out), or a merged sum alone."""
        if self.merged_weights is not None:
            return self.merged_weights[self.merged_updates[update]], None
        if self.delta_u is None or self.delta_v is None:
            return self.weight, None
        return self.weight, pick_update(self.delta_u, self.delta_v, update)

    def get_delta_weight(self, update: tuple[int, ...] = ()) -> torch.Tensor:
        """What `update` adds to `weight`: (out, in), in float32, as a new tensor.

        Raises:
            ValueError: if there are no deltas.
        """
        if self.delta_u is None or self.delta_v is None:
            raise ValueError("use_delta_projection=False: this projection has no deltas.")
        return delta_weight(self.delta_u.detach(), self.delta_v.detach(), update)

    @property
    def is_merged(self) -> bool:
        """Whether the forward pass uses sums of base and update that were computed ahead."""
        return self.merged_weights is not None

    def unmerge(self) -> None:
        """Forget the sums. The parameters were never touched, so there is nothing to restore."""
        self.merged_weights = None
        self.merged_updates = {}

    def train(self, mode: bool = True) -> "DeltaProjection":
        """As in PyTorch; the sums would not follow what training does to the parameters, so they are forgotten."""
        if mode and self.is_merged:
            warnings.warn("Merged deltas cannot be trained: they are unmerged.", stacklevel=2)
            self.unmerge()
        return super().train(mode)


def _unmerge(projection: DeltaProjection, *args: Any) -> None:
    """Before weights are loaded: the sums would not follow them."""
    projection.unmerge()


class MemoryProjection(DeltaProjection):
    """A DeltaProjection of all levels side by side. They may come one by one: then the products with each add up."""

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        """Tensors (..., width), whose widths add up to in, to (..., out); more than one only without gradients."""
        if len(levels) == 1:
            return super().forward(levels[0])
        first, *others = (level.flatten(0, -2) for level in levels)
        widths = [level.shape[-1] for level in levels]
        base, pair = self.operands()
        first_weight, *weights = base.split(widths, dim=1)
        projected = F.linear(first, first_weight)
        dtype = projected.dtype  # autocast has chosen it, and leaves what is done in place alone
        for level, weight in zip(others, weights):
            projected.addmm_(level.to(dtype), weight.T.to(dtype))
        if pair is not None:
            first_factor, *factors = pair[0].split(widths)
            reduced = first @ first_factor
            for level, factor in zip(others, factors):
                reduced.addmm_(level.to(dtype), factor.to(dtype))
            projected = projected.addmm_(reduced, pair[1].to(dtype))
        return self.norm(self.act(projected)).unflatten(0, levels[0].shape[:-1])


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
    """EMHSA, section 4.1 and equation (2): pre-normalised global attention over the query grid.

    With `projector_sr_ratio` above 1, keys and values are those of the average of each sr x sr cell.
    """

    def __init__(self, config: DeltaLlavaConfig, channels: int):
        super().__init__()
        self.config = config.vision_config  # attention over patches follows the tower's attention implementation
        self.head_dim = config.projector_head_dim
        self.sr_ratio = config.projector_sr_ratio
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.norm = nn.LayerNorm(channels)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, V, channels) to the same shape; the residual is the caller's."""
        hidden_states = self.norm(hidden_states)
        memory = hidden_states
        if self.sr_ratio > 1:
            memory = to_tokens(F.avg_pool2d(to_map(memory), self.sr_ratio, ceil_mode=True, count_include_pad=False))
        query = self._split_heads(self.q_proj(hidden_states))
        key, value = self._split_heads(self.k_proj(memory)), self._split_heads(self.v_proj(memory))
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attention_interface(
            self, query, key, value, None, scaling=self.scaling, dropout=0.0, is_causal=self.is_causal
        )
        return self.out_proj(attended.flatten(2))

    def _split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


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
    """Windowed cross-attention, equations (9) and (10): w x w queries attend to the (w s) x (w s) patches under them.

    `in_out_projections` adds the packed query/key/value projection and the output projection of the released code. The
    parts of keys and values move to the queries' side: with `W_k` and `W_v` of one head, `q . (W_k k + b_k)` is
    `(W_k^T q) . k` plus what is the same for all keys, which a softmax ignores; and `sum a (W_v v + b_v)` is
    `W_v (sum a v) + b_v`, as the weights `a` sum to one. There is one query for s * s patches, so that is s * s times
    less work. Every head then has a query as wide as the keys, and all share one set of keys and values.
    """

    def __init__(self, config: DeltaLlavaConfig, in_out_projections: bool):
        super().__init__()
        channels = config.vision_config.hidden_size
        self.num_heads = config.num_window_attention_heads
        self.window_size = config.projector_window_size
        if in_out_projections:
            # Packed rows: query, key, value. A raw parameter, because its parts enter algebra of their own.
            self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
            self.in_proj_bias = nn.Parameter(torch.empty(3 * channels))
            self.out_proj = nn.Linear(channels, channels)
        else:
            self.out_proj = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform on the packed matrix and zero biases, as in the released code."""
        if self.out_proj is not None:
            nn.init.xavier_uniform_(self.in_proj_weight)
            nn.init.zeros_(self.in_proj_bias)

    def forward(self, query: torch.Tensor | None, key: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
        """Queries (B, V, C), and keys and values of each window (B, windows, tokens, C), to (B, V, C).

        Where a window holds one patch, that has all the weight, whatever query and key are: they may be `None`.
        (A method of its own for that case would pass by the hooks that fetch offloaded weights.)
        """
        if query is None or key is None:
            return self._project_values(value.flatten(1, 2))
        if self.out_proj is not None:
            return self._attend_projected(query, key, value)
        query = to_windows(query, self.window_size)
        batch = query.shape[:2]
        # (B, windows, tokens, C) to (B * windows, heads, tokens, C / heads)
        query, key, value = (
            tokens.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tokens in (query, key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return from_windows(attended.unflatten(0, batch))

    def _attend_projected(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One query per window: (B, V, C), and keys and values (B, V, tokens, C), to (B, V, C)."""
        assert self.out_proj is not None
        heads = (self.num_heads, -1)
        (wq, wk, wv), (bq, _, bv) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        windows = query.shape[:2]
        query = F.linear(query, wq, bq).flatten(0, 1).unflatten(-1, heads)
        query = query * query.shape[-1] ** -0.5
        # (heads, windows, d) @ (heads, d, C); then the heads stand where a sequence of queries stands.
        wide_query = (query.transpose(0, 1) @ wk.unflatten(0, heads)).transpose(0, 1)
        scores = wide_query @ key.flatten(0, 1).transpose(1, 2)
        del wide_query  # as large as what comes next: with scores this small no fused kernel would save memory
        attended = scores.softmax(dim=-1) @ value.flatten(0, 1)
        attended = attended.transpose(0, 1) @ wv.unflatten(0, heads).transpose(1, 2)
        attended = attended.transpose(0, 1).flatten(1) + bv
        return self.out_proj(attended.unflatten(0, windows))

    def _project_values(self, value: torch.Tensor) -> torch.Tensor:
        assert self.out_proj is not None
        wv, bv = self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]
        return self.out_proj(F.linear(value, wv, bv))


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
        # One half of the table depends on the column alone, the other in the same way on the row: resize one line.
        line = table[: self.grid_size, : self.channels // 2].float().T[None, :, None]
        line = F.interpolate(line, (1, grid_size), mode="bicubic", align_corners=False)[0, :, 0].T.to(dtype)
        side = (grid_size, grid_size, -1)
        return torch.cat([line[None].expand(side), line[:, None].expand(side)], dim=-1).flatten(0, 1)


class DeltaLlavaProjector(nn.Module):
    """Visual tokens for the language model from the tower's patch features, in the layout `config.projector_layout`.

    `"released"`: interpolate, refine (one block), add positions, project queries; keys and values from all levels side
    by side; window attention with its own projections; feed-forward to the language model's width.

    `"paper"`: equations (3) to (11). Queries, keys and values have one base each (or one for all three,
    `delta_sharing="all"`), with a rank-r update per level. The query has no level axis in equation (4), so its updates
    add up.

    No parameter depends on the scale factor.
    """

    def __init__(self, config: DeltaLlavaConfig):
        super().__init__()
        self.config = config
        width, hidden_size = config.vision_config.hidden_size, config.text_config.hidden_size
        rank = config.delta_rank if config.use_delta_projection else 0
        levels = len(config.vision_feature_levels)
        act = config.projector_hidden_act
        self.position = PositionEmbedding2D(config.grid_size, width)
        self.block = None
        if config.projector_layout == "released":
            if config.use_transformer_block:
                self.block = ReleasedTransformerBlock(config)
            self.q_proj = DeltaProjection(width, width, rank, hidden_act=act)
            self.k_proj = MemoryProjection(levels * width, width, rank, hidden_act=act)
            self.v_proj = MemoryProjection(levels * width, width, rank, hidden_act=act)
            self.window_attention = WindowAttention(config, in_out_projections=True)
            self.feed_forward = FeedForward(width, hidden_size, hidden_size, act)
        else:
            self.refine = Refinement(config)
            if config.delta_sharing == "all":
                self.qkv_proj = DeltaProjection(width, width, rank, updates=(3, levels))
            else:
                self.q_proj = DeltaProjection(width, width, rank, updates=(levels,))
                self.k_proj = DeltaProjection(width, width, rank, updates=(levels,))
                self.v_proj = DeltaProjection(width, width, rank, updates=(levels,))
            if config.use_transformer_block:
                self.block = PaperTransformerBlock(config)
            self.window_attention = WindowAttention(config, in_out_projections=False)
            self.feed_forward_norm = nn.LayerNorm(width)
            self.feed_forward = FeedForward(width, hidden_size, width, act)
            self.out_proj = nn.Linear(width, hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base weights, which quantisers leave alone."""
        return (self.qkv_proj if self.config.delta_sharing == "all" else self.q_proj).weight.dtype

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
        grid_size = self._query_grid(features.shape[1], len(levels), scale_factor)
        if self.config.projector_layout == "released":
            return self._released(features, levels, grid_size, scale_factor)
        return self._paper(features, levels, grid_size, scale_factor)

    def _released(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], grid_size: int, scale_factor: int
    ) -> torch.Tensor:
        if torch.is_grad_enabled():
            # The base's gradient comes in one piece then, which saves more than this copy costs.
            levels = [torch.cat(list(levels), dim=-1)]
        else:
            levels = [level.contiguous() for level in levels]
        value = to_windows(self.v_proj(levels), scale_factor)
        if scale_factor == 1 and not torch.is_grad_enabled():
            # One patch per window, so nothing reaches the output but values. Training needs the zero gradients of the
            # rest, because DDP waits for every parameter.
            return self.feed_forward(self.window_attention(None, None, value))
        key, query = to_windows(self.k_proj(levels), scale_factor), resize(features, grid_size)
        if self.block is not None:
            query = self.block(query)
        query = self.q_proj(query + self.position(grid_size, query.dtype))
        return self.feed_forward(self.window_attention(query, key, value))

    def _paper(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], grid_size: int, scale_factor: int
    ) -> torch.Tensor:
        query = resize(features, grid_size)
        query = self.refine(query)
        query = query + self.position(grid_size, query.dtype)  # (3)
        query = self._role("q", query)  # (4)
        if self.block is not None:
            query = self.block(query)  # (6)
        size = self.config.projector_window_size * scale_factor
        key, value = (  # (7), (8)
            joined([to_windows(self._role(role, level, index), size) for index, level in enumerate(levels)])
            for role in "kv"
        )
        attended = self.window_attention(query, key, value)  # (9), (10)
        refined = attended + self.feed_forward(self.feed_forward_norm(attended))  # (11)
        return self.out_proj(refined)

    def _role(self, role: str, hidden_states: torch.Tensor, *level: int) -> torch.Tensor:
        if self.config.delta_sharing == "all":
            return self.qkv_proj(hidden_states, ("qkv".index(role), *level))
        return getattr(self, f"{role}_proj")(hidden_states, level)

    def _query_grid(self, num_patches: int, num_levels: int, scale_factor: int) -> int:
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ValueError(
                f"The projector needs a square grid of patches, and got {num_patches}; drop the class token "
                "(vision_feature_select_strategy='default') or use square images."
            )
        if num_levels != len(self.config.vision_feature_levels):
            raise ValueError(
                "The projector needs one tensor for each of vision_feature_levels="
                f"{self.config.vision_feature_levels}, and got {num_levels}."
            )
        if side % (scale_factor * self.config.projector_window_size):
            raise ValueError(
                f"scale_factor={scale_factor}: it does not divide the {side} x {side} patch grid into whole windows."
            )
        return side // scale_factor


def pick_update(
    delta_u: torch.Tensor, delta_v: torch.Tensor, update: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors (in, r) and (r, out) of one update; where `update` leaves several, those of their sum."""
    delta_u, delta_v = delta_u[update], delta_v[update]
    if delta_u.dim() == 3:  # a sum of rank-r updates is one update of rank L * r
        delta_u, delta_v = delta_u.transpose(0, 1).flatten(1), delta_v.flatten(0, 1)
    return delta_u, delta_v


def delta_weight(delta_u: torch.Tensor, delta_v: torch.Tensor, update: tuple[int, ...] = ()) -> torch.Tensor:
    """(out, in), in float32: what one update adds to the base."""
    delta_u, delta_v = pick_update(delta_u.float(), delta_v.float(), update)
    return (delta_u @ delta_v).T


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


def joined(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tokens of all levels, (..., tokens, C) each, one after the other; a single level as it is, which `cat` would copy."""
    return levels[0] if len(levels) == 1 else torch.cat(list(levels), dim=-2)


def from_windows(windows: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_windows`: (B, windows, size * size, C) to (B, g * g, C)."""
    side, size = math.isqrt(windows.shape[1]), math.isqrt(windows.shape[2])
    return windows.unflatten(2, (size, size)).unflatten(1, (side, side)).transpose(2, 3).flatten(1, 4)
