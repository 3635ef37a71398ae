"""Parameters of the `released` projector: names, counts, initialisation, meta device, training mode."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.modeling.projector_cases import (
    clip_large_config,
    drawn_inputs,
    make_projector,
    projector_config,
    released_pair,
)
from tests.reference import goldens, names, oracle
from tests.reference.goldens import MANIFEST
from transformers_delta_llava.modeling.deltas_delta_llava import DeltaProjection
from transformers_delta_llava.modeling.modeling_delta_llava import DeltaLlavaModel
from transformers_delta_llava.modeling.projector_delta_llava import DeltaLlavaProjector


def test_parameter_count_does_not_depend_on_the_scale_factor() -> None:
    for scale_factor in (1, 2, 24):
        with torch.device("meta"):
            module = make_projector(clip_large_config(scale_factor=scale_factor))
        assert sum(parameter.numel() for parameter in module.parameters()) == 42_503_680


# ---------------------------------------------------------------------------- state dict


def golden_sized() -> DeltaLlavaProjector:
    """The projector of the goldens, without storage."""
    with torch.device("meta"):
        return make_projector(clip_large_config(hidden=MANIFEST["geometry"]["hidden_size"]))


def test_state_dict_has_exactly_the_published_tensors() -> None:
    released = golden_sized()
    entries = {
        e["name"].removeprefix(goldens.PREFIX): torch.empty(e["shape"], device="meta") for e in MANIFEST["parameters"]
    }
    expected = {name: tuple(tensor.shape) for name, tensor in names.package_state_dict(entries).items()}
    assert {name: tuple(tensor.shape) for name, tensor in released.state_dict().items()} == expected
    assert set(dict(released.named_parameters())) == set(expected)
    assert sum(p.numel() for p in released.parameters()) == MANIFEST["geometry"]["parameter_count"]


def test_low_rank_factors_are_parameters_of_their_own() -> None:
    released = golden_sized()
    for projection in (released.query, released.key, released.value):
        assert isinstance(projection, DeltaProjection)
        for name in ("weight", "delta_u", "delta_v"):
            assert type(getattr(projection, name)) is nn.Parameter
        assert not any(isinstance(module, nn.Linear) for module in projection.modules())
    assert type(released.window_attention.in_proj_weight) is nn.Parameter
    assert not any(isinstance(module, nn.MultiheadAttention) for module in released.modules())


@pytest.mark.parametrize("layout", ["released", "paper"])
def test_position_table_survives_meta_construction(layout: str, tmp_path) -> None:
    config = projector_config(grid=6, projector_layout=layout)
    model = DeltaLlavaModel(config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("position" in name for name in saved if name.startswith("multi_modal_projector."))
    loaded = DeltaLlavaModel.from_pretrained(tmp_path).multi_modal_projector
    assert torch.equal(loaded.position.table, oracle.position_table(6, 32))
    single, *levels = drawn_inputs(config, dtype=torch.float32)
    assert torch.equal(loaded.eval()(single, levels, 2), model.multi_modal_projector.eval()(single, levels, 2))


def test_projector_built_on_the_meta_device_can_be_filled() -> None:
    module, weights = released_pair(projector_config(grid=6), torch.float32)
    with torch.device("meta"):
        filled = make_projector(module.config)
    assert all(parameter.is_meta for parameter in filled.parameters())
    filled = filled.to_empty(device="cpu").eval()
    filled.position.reset_parameters()
    filled.load_state_dict(names.package_state_dict(weights))
    single, *levels = drawn_inputs(module.config, dtype=torch.float32)
    assert torch.equal(filled(single, levels, 2), module(single, levels, 2))


def test_half_precision_rounds_the_table_before_the_resize(tmp_path) -> None:
    model = DeltaLlavaModel(projector_config(grid=6)).eval()
    model.save_pretrained(tmp_path)
    loaded = DeltaLlavaModel.from_pretrained(tmp_path, dtype=torch.bfloat16).multi_modal_projector
    rounded = oracle.position_table(6, 32).bfloat16().float()
    assert torch.equal(loaded.position(3, torch.bfloat16), oracle.resize_positions(rounded, 3).bfloat16())
    single, *levels = drawn_inputs(model.config, dtype=torch.bfloat16)
    cast = model.to(torch.bfloat16).multi_modal_projector
    assert torch.equal(loaded(single, levels, 2), cast(single, levels, 2))


# ---------------------------------------------------------------------------- initialisation


def test_fresh_weights_are_distributed_as_released() -> None:
    """Linear maps deviate by 0.02; factors and packed projection are Xavier-uniform, the convolution PyTorch's."""
    torch.manual_seed(0)
    projector = DeltaLlavaModel(projector_config(width=256, grid=2, hidden=256)).multi_modal_projector
    parameters = dict(projector.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif not name.endswith(("delta_u", "delta_v", "in_proj_weight", "group_conv.weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    for name in ("query.delta_u", "key.delta_u", "value.delta_v", "window_attention.in_proj_weight"):
        bound = (6 / sum(parameters[name].shape)) ** 0.5
        assert 0.9 * bound < parameters[name].abs().max().item() <= bound, name
    conv = parameters["block.conv_attention.group_conv.weight"]
    assert 0.9 * (9 * 8) ** -0.5 < conv.abs().max().item() <= (9 * 8) ** -0.5


# ---------------------------------------------------------------------------- training mode


def test_training_without_stochastic_depth_is_evaluation() -> None:
    module, _ = released_pair(projector_config(grid=6, projector_drop_path=0.0))
    single, *levels = drawn_inputs(module.config)
    evaluated = module(single, levels, 2)
    assert torch.equal(module.train()(single, levels, 2), evaluated)


def test_stochastic_depth_drops_whole_images_and_rescales_the_rest() -> None:
    module, _ = released_pair(projector_config(grid=6, projector_drop_path=0.5))
    assert module.block.attention_drop.drop_rate == pytest.approx(0.5 * 0.75)
    assert module.block.conv_drop.drop_rate == pytest.approx(0.5 * 0.25)
    assert module.block.mlp_drop.drop_rate == pytest.approx(0.5)
    torch.manual_seed(0)
    dropped = module.block.mlp_drop.train()(torch.ones(64, 3, 2))
    per_image = dropped.flatten(1)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(per_image, per_image[:, :1].expand_as(per_image))
    assert torch.equal(module.block.mlp_drop.eval()(dropped), dropped)


def test_stochastic_depth_changes_training_only() -> None:
    module, _ = released_pair(projector_config(grid=6, projector_drop_path=0.9))
    single, *levels = drawn_inputs(module.config, batch=4)
    evaluated = module(single, levels, 2)
    torch.manual_seed(0)
    assert not torch.equal(module.train()(single, levels, 2), evaluated)
