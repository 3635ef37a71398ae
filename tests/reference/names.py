"""The authors' parameters of the projector: names and shapes, and their names in this package.

The table is a second, independent copy of what the conversion does, kept plain so that the golden
tests do not depend on the code they help to check.
"""

from torch import Tensor


BLOCK = "combined_block.ntb."

RULES = {
    "q_proj_1.": "query.",
    "k_proj_1.": "key.",
    "v_proj_1.": "value.",
    "clip_attn.": "window_attention.",
    "combined_block.ntb.patch_embed.conv.": "block.stem.",
    "combined_block.ntb.norm_mhsa.": "block.attention_norm.",
    "combined_block.ntb.e_mhsa.norm.": "block.attention.norm.",
    "combined_block.ntb.e_mhsa.q.": "block.attention.query.",
    "combined_block.ntb.e_mhsa.k.": "block.attention.key.",
    "combined_block.ntb.e_mhsa.v.": "block.attention.value.",
    "combined_block.ntb.e_mhsa.proj.": "block.attention.out_proj.",
    "combined_block.ntb.projection.conv.": "block.local_proj.",
    "combined_block.ntb.mhca.group_conv3x3.": "block.conv_attention.group_conv.",
    "combined_block.ntb.mhca.norm.": "block.conv_attention.norm.",
    "combined_block.ntb.mhca.projection.": "block.conv_attention.out_proj.",
    "combined_block.ntb.mlp.conv1.": "block.mlp.fc1.",
    "combined_block.ntb.mlp.conv2.": "block.mlp.fc2.",
    "mlp.0.": "feed_forward.fc1.",
    "mlp.2.": "feed_forward.fc2.",
}
DELTA_PARAMETERS = {"U": "delta_u", "V": "delta_v", "shared_weight.weight": "weight"}


def package_name(name: str) -> str:
    """`q_proj_1.U` -> `query.delta_u`, and so on; KeyError for a name the authors do not use."""
    for prefix, replacement in RULES.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return replacement + DELTA_PARAMETERS.get(rest, rest)
    raise KeyError(name)


def package_state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the authors' names as a state dict of `DeltaLlavaProjector`; 1x1 kernels become matrices."""
    return {
        package_name(name): tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[-1] == 1 else tensor
        for name, tensor in weights.items()
    }


def parameter_shapes(
    width: int, levels: int, rank: int, attention_width: int, head_dim: int, mlp_ratio: int, hidden: int
) -> dict[str, tuple[int, ...]]:
    """Names (without prefix) and shapes of a checkpoint of any size; the order is the manifest's."""
    local = width - attention_width
    shapes: dict[str, tuple[int, ...]] = {}
    for role, inputs in (("q", width), ("k", levels * width), ("v", levels * width)):
        name = f"{role}_proj_1."
        shapes |= {name + "U": (inputs, rank), name + "V": (rank, width)}
        shapes |= {name + "shared_weight.weight": (width, inputs)}
        shapes |= {name + "norm.weight": (width,), name + "norm.bias": (width,)}
    shapes |= {"clip_attn.in_proj_weight": (3 * width, width), "clip_attn.in_proj_bias": (3 * width,)}
    shapes |= {"clip_attn.out_proj.weight": (width, width), "clip_attn.out_proj.bias": (width,)}
    shapes |= {"mlp.0.weight": (hidden, width), "mlp.0.bias": (hidden,)}
    shapes |= {"mlp.2.weight": (hidden, hidden), "mlp.2.bias": (hidden,)}
    shapes[BLOCK + "patch_embed.conv.weight"] = (attention_width, width, 1, 1)
    shapes |= {BLOCK + "e_mhsa.norm.weight": (attention_width,), BLOCK + "e_mhsa.norm.bias": (attention_width,)}
    for role in ("q", "k", "v", "proj"):
        shapes[f"{BLOCK}e_mhsa.{role}.weight"] = (attention_width, attention_width)
        shapes[f"{BLOCK}e_mhsa.{role}.bias"] = (attention_width,)
    shapes[BLOCK + "projection.conv.weight"] = (local, attention_width, 1, 1)
    shapes[BLOCK + "mhca.group_conv3x3.weight"] = (local, head_dim, 3, 3)
    shapes |= {BLOCK + "mhca.norm.weight": (local,), BLOCK + "mhca.norm.bias": (local,)}
    shapes[BLOCK + "mhca.projection.weight"] = (local, local, 1, 1)
    shapes |= {
        BLOCK + "mlp.conv1.weight": (mlp_ratio * width, width, 1, 1),
        BLOCK + "mlp.conv1.bias": (mlp_ratio * width,),
    }
    shapes |= {BLOCK + "mlp.conv2.weight": (width, mlp_ratio * width, 1, 1), BLOCK + "mlp.conv2.bias": (width,)}
    shapes |= {BLOCK + "norm_mhsa.weight": (attention_width,), BLOCK + "norm_mhsa.bias": (attention_width,)}
    return shapes
