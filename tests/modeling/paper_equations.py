"""Equations (3) to (11) of the paper, each in a few lines on plain tensors.

`p` holds parameters by their name below the module concerned, `x` is (B, tokens, C) with tokens in
row-major order. Letters: b image, n m token, c i o channel, h head, d channel of a head, r rank,
l level. Where the paper is silent, the choice is named in the docstring.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


Parameters = dict[str, Tensor]


def below(p: Parameters, prefix: str) -> Parameters:
    """The parameters of a submodule, without its name."""
    return {name.removeprefix(prefix + "."): tensor for name, tensor in p.items() if name.startswith(prefix + ".")}


def linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return torch.einsum("bni,oi->bno", x, p[name + ".weight"]) + p.get(name + ".bias", 0)


def norm(p: Parameters, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    deviation = x - x.mean(-1, keepdim=True)
    return deviation / (deviation.pow(2).mean(-1, keepdim=True) + eps).sqrt() * p[name + ".weight"] + p[name + ".bias"]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Equation (2): softmax(Q K^T / sqrt(d)) V, head by head."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)


def emhsa(p: Parameters, x: Tensor, head_dim: int) -> Tensor:
    """Section 4.1: pre-norm, equation (2) with K' and V' at full resolution, output map."""
    y = norm(p, "norm", x)
    q, k, v = (linear(p, role, y) for role in ("query", "key", "value"))
    return linear(p, "out_proj", attention(q, k, v, x.shape[-1] // head_dim))


def mhca(p: Parameters, x: Tensor, head_dim: int) -> Tensor:
    """Section 4.1: 3x3 convolution with one group per head, LayerNorm, ReLU, a map that merges the heads."""
    side, groups = math.isqrt(x.shape[1]), x.shape[-1] // head_dim
    patches = F.unfold(x.transpose(1, 2).unflatten(2, (side, side)), 3, padding=1)  # (B, C * 9, n)
    patches = patches.unflatten(1, (groups, head_dim, 9))
    kernel = p["group_conv.weight"].flatten(2).unflatten(0, (groups, head_dim))
    y = torch.einsum("bgikn,goik->bngo", patches, kernel).flatten(2)
    return linear(p, "out_proj", norm(p, "norm", y).clamp(min=0))


def refine(p: Parameters, x: Tensor, head_dim: int, use_emhsa: bool = True) -> Tensor:
    """Refine of (3). Order of section 4.1 (MHCA, EMHSA); a residual around each, as section 4.1 says of MHCA."""
    x = x + mhca(below(p, "conv_attention"), x, head_dim)
    return x + emhsa(below(p, "attention"), x, head_dim) if use_emhsa else x


def interpolated(z: Tensor, side: int) -> Tensor:
    """Interp of (3): bilinear, as in the released code."""
    grid = math.isqrt(z.shape[1])
    image = F.interpolate(z.transpose(1, 2).unflatten(2, (grid, grid)), (side, side), mode="bilinear")
    return image.flatten(2).transpose(1, 2)


def effective_weight(p: Parameters, *update: int) -> Tensor:
    """W_s + sum of U V^T of (4), (out, in). `delta_u` is (..., in, r), `delta_v` (..., r, out).

    Equation (4) has no axis that the levels could stand on, so for queries the updates of all levels add up.
    """
    u, v = p["delta_u"][update], p["delta_v"][update]
    u, v = (u, v) if u.ndim == 3 else (u[None], v[None])
    return p["weight"] + torch.einsum("lir,lro->oi", u, v)


def project(p: Parameters, x: Tensor, *update: int) -> Tensor:
    """(4) and (8): (W_s + Delta W) x."""
    return torch.einsum("bni,oi->bno", x, effective_weight(p, *update))


def cascade(p: Parameters, x: Tensor, head_dim: int, use_emhsa: bool = True) -> Tensor:
    """NTB of (6): EMHSA, MHCA, MLP (ReLU), a residual around each, all at full width."""
    if use_emhsa:
        x = x + emhsa(below(p, "attention"), x, head_dim)
    x = x + mhca(below(p, "conv_attention"), x, head_dim)
    return x + linear(p, "mlp.fc2", linear(p, "mlp.fc1", x).clamp(min=0))


def window_attention(q: Tensor, keys: list[Tensor], values: list[Tensor], heads: int) -> Tensor:
    """(9) and (10), query by query; the memory of a query is the patches under it at every level."""
    side, grid = math.isqrt(q.shape[1]), math.isqrt(keys[0].shape[1])
    reach, output = grid // side, torch.empty_like(q)
    for i in range(side):
        for j in range(side):
            rows, columns = slice(i * reach, (i + 1) * reach), slice(j * reach, (j + 1) * reach)
            k, v = (
                torch.cat([x.unflatten(1, (grid, grid))[:, rows, columns].flatten(1, 2) for x in levels], 1)
                for levels in (keys, values)
            )
            token = slice(i * side + j, i * side + j + 1)
            output[:, token] = attention(q[:, token], k, v, heads)
    return output


def feed_forward(p: Parameters, t: Tensor) -> Tensor:
    """(11): T + W2 sigma(W1 LN(T)), sigma the exact GELU."""
    return t + linear(p, "feed_forward.fc2", F.gelu(linear(p, "feed_forward.fc1", norm(p, "feed_forward_norm", t))))
