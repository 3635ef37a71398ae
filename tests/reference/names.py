"""The authors' parameter names of the projector in the words of this package's `released` layout.

A second, independent copy of what the conversion does, kept as a plain table so that the golden
tests do not depend on the code they help to check.
"""

from torch import Tensor

RULES = {
    "q_proj_1.": "q_proj.",
    "k_proj_1.": "k_proj.",
    "v_proj_1.": "v_proj.",
    "clip_attn.": "window_attention.",
    "combined_block.ntb.patch_embed.conv.": "block.stem.",
    "combined_block.ntb.norm_mhsa.": "block.attention_norm.",
    "combined_block.ntb.e_mhsa.norm.": "block.attention.norm.",
    "combined_block.ntb.e_mhsa.q.": "block.attention.q_proj.",
    "combined_block.ntb.e_mhsa.k.": "block.attention.k_proj.",
    "combined_block.ntb.e_mhsa.v.": "block.attention.v_proj.",
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
    """`q_proj_1.U` -> `q_proj.delta_u`, and so on; KeyError for a name the authors do not use."""
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
