"""Deterministic numbers for the golden fixtures (weights and inputs).

Nothing here is random between runs: every tensor is a pure function of its
name, its shape and one integer seed, so a fixture needs to store only names,
shapes, seeds and *outputs*.

The recipe, in words
--------------------
1.  draw(name, shape, seed)
        key = (crc32 of the UTF-8 name, xor seed) & 0xffffffff
        a   = numpy.random.RandomState(key).standard_normal(shape), float32
2.  A weight is that draw put through one rule. The rule follows from the full
    name (as in a whole checkpoint, e.g. "model.mm_projector.mlp.0.weight") and
    only the shape; the first line that matches wins. All arithmetic is
    float32 and each constant is rounded to float32 first.

        norm        1-D and name ends in ".weight"        1 + 0.1 * a
        bias        name ends in "bias"                   0.02 * a
        embedding   at most 2-D and the name contains     0.5 * a
                    "embed_tokens", "position_embedding"
                    or "class_embedding"
        delta_u     name ends in ".U"                     a * (1 / sqrt(shape[0]))
        delta_v     name ends in ".V"                     a * (0.3 / sqrt(shape[0]))
        matrix      everything else                       a * (1 / sqrt(fan_in)),
                                                          fan_in = prod(shape[1:])

    With these two delta rules U @ V has 0.3 times the Frobenius norm of the
    base matrix it is added to, so a lost, transposed or doubled delta shows.
    A 1-D "...weight" can only be the gain of a LayerNorm or an RMSNorm in the
    models used here.
3.  An input is draw(label, shape, seed) as it is; the label is written next to
    each fixture.

numpy's legacy RandomState is frozen by numpy's compatibility policy, so the
numbers do not depend on the numpy version.
"""

import math
import zlib

import numpy as np


EMBEDDING_MARKS = ("embed_tokens", "position_embedding", "class_embedding")


def draw(name, shape, seed):
    """Standard-normal float32 array that depends on name, shape and seed only."""
    key = (zlib.crc32(name.encode("utf-8")) ^ int(seed)) & 0xFFFFFFFF
    state = np.random.RandomState(key)
    return state.standard_normal(tuple(int(d) for d in shape)).astype(np.float32)


def rule(name, shape):
    """Which of the six rules applies to a parameter of this name and shape."""
    if len(shape) == 1 and name.endswith(".weight"):
        return "norm"
    if name.endswith("bias"):
        return "bias"
    if len(shape) <= 2 and any(mark in name for mark in EMBEDDING_MARKS):
        return "embedding"
    if name.endswith(".U"):
        return "delta_u"
    if name.endswith(".V"):
        return "delta_v"
    if len(shape) < 2:
        raise ValueError(f"no rule for {name} {tuple(shape)!r}")
    return "matrix"


def scale(name, shape):
    """The factor of the draw, as a float32."""
    kind = rule(name, shape)
    if kind == "norm":
        factor = 0.1
    elif kind == "bias":
        factor = 0.02
    elif kind == "embedding":
        factor = 0.5
    elif kind == "delta_u":
        factor = 1.0 / math.sqrt(shape[0])
    elif kind == "delta_v":
        factor = 0.3 / math.sqrt(shape[0])
    else:
        factor = 1.0 / math.sqrt(math.prod(shape[1:]))
    return np.float32(factor)


def weight(name, shape, seed):
    """The float32 value of one parameter; name is the full checkpoint name."""
    value = draw(name, shape, seed) * scale(name, shape)
    if rule(name, shape) == "norm":
        value = value + np.float32(1.0)
    return value


def weights(entries, seed):
    """{name: array} for manifest entries, each a dict with "name" and "shape"."""
    return {e["name"]: weight(e["name"], e["shape"], seed) for e in entries}


def sample_indices(name, numel, count, seed):
    """Sorted distinct flat (row-major) positions at which a big tensor is sampled."""
    key = (zlib.crc32(("sample/" + name).encode("utf-8")) ^ int(seed)) & 0xFFFFFFFF
    picks = np.random.RandomState(key).randint(0, numel, size=count)
    return np.unique(picks).astype(np.int64)
