"""The projector as the released code computes it, step by step, to measure against.

Written from the specification in `tests/reference/README.md`, whose step numbers stand below, not from the released code.
The oracle of the tests says what comes out, and this module meets it; but the oracle loops over windows to be easy to read,
and would be too easy to beat. Here windows go through the batch axis as they do there, and nothing is slower than it is there.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from transformers_delta_llava import DeltaLlavaProjector
from transformers_delta_llava.modeling.deltas_delta_llava import DeltaProjection
from transformers_delta_llava.modeling.projector_delta_llava import ReleasedTransformerBlock


class ReleasedProjector(nn.Module):
    """The steps of the released code, with the parameters of a `DeltaLlavaProjector` in the `"released"` layout.

    The parameters are shared, not copied: gradients end up in the projector that was given.
    """

    def __init__(self, projector: DeltaLlavaProjector):
        super().__init__()
        self.projector = projector
        width = projector.config.vision_config.hidden_size
        self.attention = nn.MultiheadAttention(width, projector.config.num_window_attention_heads, device="meta")
        self.attention.in_proj_weight = projector.window_attention.in_proj_weight
        self.attention.in_proj_bias = projector.window_attention.in_proj_bias
        self.attention.out_proj = projector.window_attention.out_proj

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.projector.dtype

    def forward(
        self, features: torch.Tensor, levels: Sequence[torch.Tensor], scale_factor: int | None = None
    ) -> torch.Tensor:
        """(B, N, C) and levels of that shape to (B, N / s^2, H)."""
        scale_factor = self.projector.config.scale_factor if scale_factor is None else scale_factor
        projector, grid = self.projector, math.isqrt(features.shape[1])
        side = grid // scale_factor
        memory = torch.cat(list(levels), dim=-1)
        key, value = project(projector.key, memory), project(projector.value, memory)  # step 1
        query = features.transpose(1, 2).reshape(len(features), -1, grid, grid)
        query = F.interpolate(query, (side, side), mode="bilinear", align_corners=False)  # 2
        if projector.block is not None:
            query = refine(projector.block, query)  # 3
        table = projector.position.table.to(query.dtype)
        if scale_factor > 1:
            image = table.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
            image = F.interpolate(image, (side, side), mode="bicubic", align_corners=False)
            table = image.permute(0, 2, 3, 1).flatten(0, 2).to(query.dtype)  # 4
        query = project(projector.query, query.flatten(2).transpose(1, 2) + table)  # 5
        key, value = (to_windows(tokens, scale_factor) for tokens in (key, value))
        attended, _ = self.attention(to_windows(query, 1), key, value)  # 6
        attended = attended.reshape(side * side, len(features), -1).transpose(0, 1)
        return projector.feed_forward(attended)  # 7


def project(projection: DeltaProjection, tokens: torch.Tensor) -> torch.Tensor:
    """A DeltaProjection through its dense effective weight, formed at every call."""
    weight = projection.weight
    if projection.delta_u is not None and projection.delta_v is not None:
        weight = weight + (projection.delta_u @ projection.delta_v).T
    return projection.norm(F.gelu(F.linear(tokens, weight)))


def refine(block: ReleasedTransformerBlock, image: torch.Tensor) -> torch.Tensor:
    """Step 3 on a (B, C, g, g) map: 1 x 1 convolutions between maps, norms and attention over tokens."""
    side = image.shape[2]
    attended = pointwise(image, block.stem)
    if block.attention is not None:
        attention = block.attention
        tokens = attention.norm(block.attention_norm(attended.flatten(2).transpose(1, 2)))
        query, key, value = (
            linear(tokens).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        scores = query @ key.transpose(2, 3) * attention.scaling
        if not torch.isfinite(scores).all():
            scores = torch.nan_to_num(scores, 0.0, 0.0, 0.0)
        scores = scores - scores.amax(dim=-1, keepdim=True)
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        mixed = block.attention_drop(attention.out_proj(mixed))
        attended = attended + mixed.transpose(1, 2).unflatten(2, (side, side))
    local = pointwise(attended, block.local_proj)
    conv = block.conv_attention
    mixed = conv.norm(conv.group_conv(local).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    local = local + block.conv_drop(pointwise(F.relu(mixed), conv.out_proj))
    joined = torch.cat([attended, local], dim=1)
    return joined + block.mlp_drop(pointwise(F.relu(pointwise(joined, block.mlp.fc1)), block.mlp.fc2))


def pointwise(image: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """A linear map as the 1 x 1 convolution that it is in the released code."""
    return F.conv2d(image, linear.weight[:, :, None, None], linear.bias)


def to_windows(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """(B, g * g, C) to (size * size, windows * B, C), the window index slower than the image's."""
    batch, count, channels = tokens.shape
    side = math.isqrt(count) // size
    grid = tokens.reshape(batch, side, size, side, size, channels)
    return grid.permute(2, 4, 1, 3, 0, 5).reshape(size * size, side * side * batch, channels)
