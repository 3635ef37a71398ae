"""The table of names: what each tensor of a released checkpoint becomes."""

import pytest
import torch

from examples.make_checkpoint import TEXT, TOWER, Recipe, checkpoint_tensors, projector_shapes
from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion import convert_state_dict
from transformers_delta_llava.conversion.weight_mapping import IGNORED, RULES, map_names
from transformers_delta_llava.utils.errors import DeltaLlavaError


# One line per tensor of the released projector, without the prefixes.
PROJECTOR_NAMES = """
q_proj_1.U q_proj.delta_u
q_proj_1.V q_proj.delta_v
q_proj_1.shared_weight.weight q_proj.weight
q_proj_1.norm.weight q_proj.norm.weight
q_proj_1.norm.bias q_proj.norm.bias
k_proj_1.U k_proj.delta_u
k_proj_1.V k_proj.delta_v
k_proj_1.shared_weight.weight k_proj.weight
k_proj_1.norm.weight k_proj.norm.weight
k_proj_1.norm.bias k_proj.norm.bias
v_proj_1.U v_proj.delta_u
v_proj_1.V v_proj.delta_v
v_proj_1.shared_weight.weight v_proj.weight
v_proj_1.norm.weight v_proj.norm.weight
v_proj_1.norm.bias v_proj.norm.bias
clip_attn.in_proj_weight window_attention.in_proj_weight
clip_attn.in_proj_bias window_attention.in_proj_bias
clip_attn.out_proj.weight window_attention.out_proj.weight
clip_attn.out_proj.bias window_attention.out_proj.bias
mlp.0.weight feed_forward.fc1.weight
mlp.0.bias feed_forward.fc1.bias
mlp.2.weight feed_forward.fc2.weight
mlp.2.bias feed_forward.fc2.bias
combined_block.ntb.patch_embed.conv.weight block.stem.weight
combined_block.ntb.e_mhsa.norm.weight block.attention.norm.weight
combined_block.ntb.e_mhsa.norm.bias block.attention.norm.bias
combined_block.ntb.e_mhsa.q.weight block.attention.q_proj.weight
combined_block.ntb.e_mhsa.q.bias block.attention.q_proj.bias
combined_block.ntb.e_mhsa.k.weight block.attention.k_proj.weight
combined_block.ntb.e_mhsa.k.bias block.attention.k_proj.bias
combined_block.ntb.e_mhsa.v.weight block.attention.v_proj.weight
combined_block.ntb.e_mhsa.v.bias block.attention.v_proj.bias
combined_block.ntb.e_mhsa.proj.weight block.attention.out_proj.weight
combined_block.ntb.e_mhsa.proj.bias block.attention.out_proj.bias
combined_block.ntb.projection.conv.weight block.local_proj.weight
combined_block.ntb.mhca.group_conv3x3.weight block.conv_attention.group_conv.weight
combined_block.ntb.mhca.norm.weight block.conv_attention.norm.weight
combined_block.ntb.mhca.norm.bias block.conv_attention.norm.bias
combined_block.ntb.mhca.projection.weight block.conv_attention.out_proj.weight
combined_block.ntb.mlp.conv1.weight block.mlp.fc1.weight
combined_block.ntb.mlp.conv1.bias block.mlp.fc1.bias
combined_block.ntb.mlp.conv2.weight block.mlp.fc2.weight
combined_block.ntb.mlp.conv2.bias block.mlp.fc2.bias
combined_block.ntb.norm_mhsa.weight block.attention_norm.weight
combined_block.ntb.norm_mhsa.bias block.attention_norm.bias
"""
PROJECTOR = {
    f"model.mm_projector.{old}": f"model.multi_modal_projector.{new}"
    for old, new in (line.split() for line in PROJECTOR_NAMES.split("\n") if line)
}
OTHERS = {
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.layers.31.self_attn.q_proj.weight": "model.language_model.layers.31.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate_up_proj.weight": "model.language_model.layers.0.mlp.gate_up_proj.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.vision_model.pre_layrnorm.bias",
    "model.vision_tower.vision_tower.encoder.layers.3.mlp.fc1.bias": (
        "model.vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias"
    ),
}


@pytest.mark.parametrize(("source", "target"), {**PROJECTOR, **OTHERS}.items())
def test_each_name_alone(source, target):
    tensor = torch.randn(3, 2)
    (converted,) = convert_state_dict({source: tensor}).items()
    assert converted[0] == target
    assert torch.equal(converted[1], tensor)


def test_the_fixture_has_the_released_names():
    assert {f"model.mm_projector.{name}" for name in projector_shapes(128, 64)} == PROJECTOR.keys()


def test_1x1_convolutions_become_matrices_and_nothing_else_changes():
    source = {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in projector_shapes(128, 64).items()}
    converted = convert_state_dict(source)
    squeezed = set()
    for name, tensor in source.items():
        result = converted[PROJECTOR[name]]
        if result.shape != tensor.shape:
            squeezed.add(name.removeprefix("model.mm_projector.combined_block.ntb."))
            assert tensor.shape == (*result.shape, 1, 1)
        assert torch.equal(result.flatten(), tensor.flatten())
        assert result.dtype == tensor.dtype
    convolutions = "patch_embed.conv projection.conv mhca.projection mlp.conv1 mlp.conv2"
    assert squeezed == {f"{name}.weight" for name in convolutions.split()}


def test_the_result_is_what_the_model_loads():
    tensors = checkpoint_tensors(Recipe(tower=False), {})
    text = {**TEXT, "model_type": "llama"}
    config = DeltaLlavaConfig({**TOWER, "model_type": "clip_vision_model"}, text, image_token_id=319)
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config)
    shapes = {name: value.shape for name, value in model.state_dict().items() if "vision_tower" not in name}
    assert {name: value.shape for name, value in convert_state_dict(tensors).items()} == shapes


def test_half_precision_stays():
    name = "model.mm_projector.q_proj_1.U"
    assert (
        convert_state_dict({name: torch.ones(4, 2, dtype=torch.bfloat16)})[
            "model.multi_modal_projector.q_proj.delta_u"
        ].dtype
        is torch.bfloat16
    )


def test_computed_buffers_are_left_out_with_a_reason():
    names = [
        "model.mm_projector.pos_embed",
        "model.layers.7.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    ]
    assert convert_state_dict({name: torch.zeros(2) for name in names}) == {}
    assert set(map_names(names).ignored) == set(names)
    assert all("computed" in reason for reason in map_names(names).ignored.values())


def test_unknown_names_are_listed():
    names = ["model.norm.weight", "model.image_newline", "model.mm_projector.z_proj_1.U", "model.layers.x.mlp.weight"]
    with pytest.raises(DeltaLlavaError) as error:
        convert_state_dict({name: torch.zeros(2) for name in names})
    assert all(name in str(error.value) for name in names[1:])
    assert names[0] not in str(error.value)


def test_names_need_their_full_prefix():
    with pytest.raises(DeltaLlavaError, match=r"q_proj_1\.U"):
        convert_state_dict({"q_proj_1.U": torch.zeros(2, 2)})


def test_two_names_for_one_place_are_refused():
    names = ["model.vision_tower.vision_tower.vision_model.x.weight", "model.vision_tower.vision_tower.x.weight"]
    with pytest.raises(DeltaLlavaError) as error:
        convert_state_dict({name: torch.zeros(2) for name in names})
    assert all(name in str(error.value) for name in names)


def test_a_convolution_with_a_real_kernel_is_refused():
    name = "model.mm_projector.combined_block.ntb.patch_embed.conv.weight"
    with pytest.raises(DeltaLlavaError, match="1x1 convolution") as error:
        convert_state_dict({name: torch.zeros(4, 4, 3, 3)})
    assert name in str(error.value)


def test_long_lists_of_names_are_cut():
    with pytest.raises(DeltaLlavaError, match="and 5 more"):
        convert_state_dict({f"strange.{i}": torch.zeros(1) for i in range(25)})


def test_no_row_of_the_table_hides_another():
    """Each row applies to some name that no earlier row takes."""
    names = [*PROJECTOR, *OTHERS, "model.norm.bias", "lm_head.bias"]
    used = {rule.source for _, rule in map_names(names).rules.values()}
    assert used == {rule.source for rule in RULES}
    assert len(IGNORED) == len(set(IGNORED))
