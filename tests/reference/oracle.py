"""A literal, slow oracle of the released projector, on plain tensors under the authors' names.

Written from the specification in `README.md` next to this file (step numbers below are its) and from
nothing else. It shares no code with the package, never batches windows, forms the
dense `W + (U V)^T`, and spells out softmax, LayerNorm, GELU and convolutions. Only the two resizes
call PyTorch; `test_oracle.py` checks those against hand-written kernels.

Every size is read from the tensors. What tensors cannot tell is the scale factor and the number of
heads of the window attention. Works in float32 and float64: the dtype is that of the inputs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


PREFIX = "model.mm_projector."
BLOCK = "combined_block.ntb."
DELTA_EPS = 1e-6
BLOCK_EPS = 1e-5

Weights = dict[str, Tensor]


# ---------------------------------------------------------------------------- arithmetic


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` over the last axis; `weight` is (out, in)."""
    y = torch.einsum("...i,oi->...o", x, weight)
    return y if bias is None else y + bias


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution over channels-last tokens; `weight` is (out, in, 1, 1)."""
    return linear(x, weight[:, :, 0, 0], bias)


def gelu(x: Tensor) -> Tensor:
    """The exact GELU: x times the standard normal distribution function."""
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis, with the biased variance."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + bias


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis; the maximum is subtracted first, which changes nothing."""
    powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return powers / powers.sum(dim=-1, keepdim=True)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention, (B, Nq, C) and (B, Nk, C) to (B, Nq, C); heads are contiguous channels."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", softmax(scores), v).flatten(-2)


def grouped_conv3x3(tokens: Tensor, weight: Tensor, grid: int) -> Tensor:
    """Grouped 3x3 convolution, zero padding 1, no bias, as a sum over nine shifts of every group.

    `weight` is (out, in / groups, 3, 3), so the number of groups follows from the shapes.
    """
    batch, _, channels = tokens.shape
    per_group = weight.shape[1]
    groups = channels // per_group
    out_per_group = weight.shape[0] // groups
    padded = torch.zeros(batch, grid + 2, grid + 2, channels, dtype=tokens.dtype)
    padded[:, 1:-1, 1:-1] = tokens.reshape(batch, grid, grid, channels)
    outputs = []
    for group in range(groups):
        kernel = weight[group * out_per_group : (group + 1) * out_per_group]
        source = padded[..., group * per_group : (group + 1) * per_group]
        total = torch.zeros(batch, grid, grid, out_per_group, dtype=tokens.dtype)
        for row in range(3):
            for column in range(3):
                shifted = source[:, row : row + grid, column : column + grid]
                total = total + linear(shifted, kernel[:, :, row, column])
        outputs.append(total)
    return torch.cat(outputs, dim=-1).reshape(batch, grid * grid, -1)


# ---------------------------------------------------------------------------- DeltaProjection


def effective_weight(base: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """`W + (U V)^T`, (out, in): U is (in, r), V is (r, out), no scale."""
    return base + torch.einsum("ir,ro->oi", u, v)


def delta_projection(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Linear map with the effective weight, exact GELU, LayerNorm over the outputs (eps 1e-6)."""
    dense = effective_weight(weights[f"{name}.shared_weight.weight"], weights[f"{name}.U"], weights[f"{name}.V"])
    y = gelu(linear(x, dense))
    return layer_norm(y, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"], DELTA_EPS)


# ---------------------------------------------------------------------------- step 2: query grid


def grid_side(tokens: Tensor) -> int:
    """Side of the square grid that (B, N, C) tokens lie on, row-major."""
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not form a square grid")
    return side


def resize_queries(x: Tensor, side: int) -> Tensor:
    """(B, N, C) to (B, side * side, C): bilinear, half-pixel centres, no antialiasing."""
    batch, _, channels = x.shape
    grid = grid_side(x)
    image = x.reshape(batch, grid, grid, channels).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(side, side), mode="bilinear", align_corners=False, antialias=False)
    return image.permute(0, 2, 3, 1).reshape(batch, side * side, channels)


# ---------------------------------------------------------------------------- step 3: refinement block


def block_stem(weights: Weights, x: Tensor) -> Tensor:
    """Step 3a."""
    return pointwise(x, weights[BLOCK + "patch_embed.conv.weight"])


def global_attention(weights: Weights, x: Tensor, head_dim: int) -> Tensor:
    """Step 3b without its residual: two LayerNorms in a row, then attention over all tokens."""
    y = layer_norm(x, weights[BLOCK + "norm_mhsa.weight"], weights[BLOCK + "norm_mhsa.bias"], BLOCK_EPS)
    y = layer_norm(y, weights[BLOCK + "e_mhsa.norm.weight"], weights[BLOCK + "e_mhsa.norm.bias"], BLOCK_EPS)
    q, k, v = (
        linear(y, weights[f"{BLOCK}e_mhsa.{role}.weight"], weights[f"{BLOCK}e_mhsa.{role}.bias"]) for role in "qkv"
    )
    mixed = attend(q, k, v, heads=x.shape[-1] // head_dim)
    return linear(mixed, weights[BLOCK + "e_mhsa.proj.weight"], weights[BLOCK + "e_mhsa.proj.bias"])


def local_branch(weights: Weights, x: Tensor, grid: int) -> Tensor:
    """Step 3c: the channels that the concatenation of step 3d appends."""
    local = pointwise(x, weights[BLOCK + "projection.conv.weight"])
    y = grouped_conv3x3(local, weights[BLOCK + "mhca.group_conv3x3.weight"], grid)
    y = layer_norm(y, weights[BLOCK + "mhca.norm.weight"], weights[BLOCK + "mhca.norm.bias"], BLOCK_EPS)
    return local + pointwise(relu(y), weights[BLOCK + "mhca.projection.weight"])


def block_mlp(weights: Weights, u: Tensor) -> Tensor:
    """Step 3e without its residual: ReLU between two 1x1 convolutions with bias, no norm."""
    hidden = relu(pointwise(u, weights[BLOCK + "mlp.conv1.weight"], weights[BLOCK + "mlp.conv1.bias"]))
    return pointwise(hidden, weights[BLOCK + "mlp.conv2.weight"], weights[BLOCK + "mlp.conv2.bias"])


def refinement_block(weights: Weights, x: Tensor) -> dict[str, Tensor]:
    """Step 3 on (B, g * g, C); returns its named intermediates, `query_after_ntb` being the result."""
    head_dim = weights[BLOCK + "mhca.group_conv3x3.weight"].shape[1]  # heads and groups have the same width
    stem = block_stem(weights, x)
    attended = stem + global_attention(weights, stem, head_dim)
    joined = torch.cat([attended, local_branch(weights, attended, grid_side(attended))], dim=-1)
    return {
        "ntb_stem": stem,
        "ntb_after_attention": attended,
        "ntb_concat": joined,
        "query_after_ntb": joined + block_mlp(weights, joined),
    }


# ---------------------------------------------------------------------------- step 4: positions


def position_table(grid: int, channels: int) -> Tensor:
    """(grid * grid, channels) float32: sin and cos of the column, then of the row."""
    quarter = channels // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows = []
    for i in range(grid):
        for j in range(grid):
            column, row = j * frequencies, i * frequencies
            rows.append(torch.cat([column.sin(), column.cos(), row.sin(), row.cos()]))
    return torch.stack(rows).to(torch.float32)


def resize_positions(table: Tensor, side: int) -> Tensor:
    """(N, C) to (side * side, C): bicubic (a = -0.75), half-pixel centres, no antialiasing."""
    grid = math.isqrt(table.shape[0])
    if side == grid:
        return table
    image = table.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False, antialias=False)
    return image.permute(0, 2, 3, 1).reshape(side * side, -1)


# ---------------------------------------------------------------------------- step 6: window attention


def window_attention(weights: Weights, q: Tensor, k: Tensor, v: Tensor, scale_factor: int, heads: int) -> Tensor:
    """Every query sees the s * s keys of its own cell; one window after another."""
    width = q.shape[-1]
    in_weight, in_bias = weights["clip_attn.in_proj_weight"], weights["clip_attn.in_proj_bias"]
    q, k, v = (
        linear(x, in_weight[i * width : (i + 1) * width], in_bias[i * width : (i + 1) * width])
        for i, x in enumerate((q, k, v))
    )
    grid, side = grid_side(k), grid_side(q)
    output = torch.zeros_like(q)
    for row in range(side):
        for column in range(side):
            window = [
                i * grid + j
                for i in range(row * scale_factor, (row + 1) * scale_factor)
                for j in range(column * scale_factor, (column + 1) * scale_factor)
            ]
            query = row * side + column
            output[:, query] = attend(q[:, query : query + 1], k[:, window], v[:, window], heads)[:, 0]
    return linear(output, weights["clip_attn.out_proj.weight"], weights["clip_attn.out_proj.bias"])


# ---------------------------------------------------------------------------- the whole forward pass


def output_mlp(weights: Weights, x: Tensor) -> Tensor:
    """Step 7."""
    hidden = gelu(linear(x, weights["mlp.0.weight"], weights["mlp.0.bias"]))
    return linear(hidden, weights["mlp.2.weight"], weights["mlp.2.bias"])


def default_window_heads(width: int) -> int:
    """The released code writes 1024 // 128; narrower towers get at least one head."""
    return max(1, width // 128)


def keys_and_values(weights: Weights, x_multi: Tensor) -> tuple[Tensor, Tensor]:
    """Step 1."""
    return delta_projection(weights, "k_proj_1", x_multi), delta_projection(weights, "v_proj_1", x_multi)


def released_projector(
    weights: Weights, x_single: Tensor, x_multi: Tensor, scale_factor: int, window_heads: int | None = None
) -> dict[str, Tensor]:
    """The released forward pass in evaluation mode.

    Args:
        weights: tensors under the authors' names, with or without `model.mm_projector.`.
        x_single: (B, N, C), N a square grid in row-major order.
        x_multi: (B, N, L * C), the levels concatenated along channels.
        scale_factor: a divisor of the grid's side.
        window_heads: heads of step 6; None means C // 128, at least one.

    Returns:
        `output` (B, N / s^2, H) and every intermediate of the README's table under its name.
    """
    weights = {name.removeprefix(PREFIX): tensor.to(x_single.dtype) for name, tensor in weights.items()}
    grid, width = grid_side(x_single), x_single.shape[-1]
    if grid % scale_factor:
        raise ValueError(f"scale factor {scale_factor} does not divide the grid of {grid}")
    side = grid // scale_factor
    named: dict[str, Tensor] = {}
    named["k_projected"], named["v_projected"] = keys_and_values(weights, x_multi)
    named["query_interpolated"] = resize_queries(x_single, side)
    named.update(refinement_block(weights, named["query_interpolated"]))
    named["pos_embed"] = resize_positions(position_table(grid, width), side).to(x_single.dtype)
    named["query_plus_pos"] = named["query_after_ntb"] + named["pos_embed"]
    named["q_projected"] = delta_projection(weights, "q_proj_1", named["query_plus_pos"])
    named["attention_output"] = window_attention(
        weights,
        named["q_projected"],
        named["k_projected"],
        named["v_projected"],
        scale_factor,
        window_heads or default_window_heads(width),
    )
    named["output"] = output_mlp(weights, named["attention_output"])
    return named
