"""The `released` layout against the authors' numbers, and against the oracle where there are none."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, CLIPVisionConfig, SiglipVisionConfig

from tests.modeling.projector_cases import (
    clip_large_config,
    drawn_inputs,
    oracle_output,
    projector_config,
    released_pair,
)
from tests.reference import goldens, names, oracle
from tests.reference.goldens import BFLOAT16_TOLERANCE, MANIFEST, TOLERANCE, difference
from transformers_delta_llava.modeling.configuration_delta_llava import DeltaLlavaConfig
from transformers_delta_llava.modeling.modeling_delta_llava import DeltaLlavaModel
from transformers_delta_llava.modeling.projector_delta_llava import (
    DeltaLlavaProjector,
    DeltaProjection,
    eager_attention_forward,
)

# In float64 the only disagreement left is that of the float32 position table.
FLOAT64_TOLERANCE = 1e-6
KEY_BIASES = ("block.attention.k_proj.bias", "k_proj.norm.bias")
CLIP_LARGE_BUDGETS = {1: 576, 2: 144, 3: 64, 4: 36, 6: 16, 8: 9, 12: 4, 24: 1}


# ---------------------------------------------------------------------------- golden numbers


@pytest.fixture(scope="module")
def released() -> DeltaLlavaProjector:
    """The projector of the goldens; tests change its attention implementation only."""
    module = DeltaLlavaProjector(clip_large_config(hidden=MANIFEST["geometry"]["hidden_size"]))
    module.load_state_dict(names.package_state_dict(goldens.weights()))
    return module.eval()


def golden_inputs(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    x = {name: tensor.to(dtype) for name, tensor in goldens.inputs(case).items()}
    return x["x_single"], list(x["x_multi"].split(x["x_single"].shape[-1], dim=-1))


def scale_factor_of(case: str) -> int:
    return MANIFEST["cases"][case]["scale_factor"]


def recorded_run(module: DeltaLlavaProjector, case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The output of a case and, through forward hooks, every intermediate that the goldens name."""
    block, seen = module.block, {}

    def keep_input(name: str):
        return lambda _, arguments, __: seen.update({name: arguments[0]})

    def keep_output(name: str):
        return lambda _, __, output: seen.update({name: output})

    hooks = [
        block.stem.register_forward_hook(keep_input("query_interpolated")),
        block.stem.register_forward_hook(keep_output("ntb_stem")),
        block.attention.register_forward_hook(keep_output("attention branch")),
        block.mlp.register_forward_hook(keep_input("ntb_concat")),
        block.register_forward_hook(keep_output("query_after_ntb")),
        module.q_proj.register_forward_hook(keep_input("query_plus_pos")),
        module.q_proj.register_forward_hook(keep_output("q_projected")),
        module.k_proj.register_forward_hook(keep_output("k_projected")),
        module.v_proj.register_forward_hook(keep_output("v_projected")),
        module.window_attention.register_forward_hook(keep_output("attention_output")),
        module.position.register_forward_hook(keep_output("pos_embed")),
    ]
    try:
        with torch.no_grad():
            single, levels = golden_inputs(case, dtype)
            seen["output"] = module(single, levels, scale_factor_of(case))
    finally:
        for hook in hooks:
            hook.remove()
    seen["ntb_after_attention"] = seen["ntb_stem"] + seen.pop("attention branch")
    return seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_output_and_every_intermediate_meet_the_golden(released: DeltaLlavaProjector, attention: str) -> None:
    released.config.vision_config._attn_implementation = attention
    seen, golden = recorded_run(released, "s2"), goldens.expected("s2")
    assert set(seen) == set(MANIFEST["cases"]["s2"]["tensors"])
    for name, tensor in seen.items():
        assert difference(goldens.stored_tokens(name, tensor), golden[name]) <= TOLERANCE, name


@pytest.mark.parametrize("case", ["s2_small", "s24"])
def test_output_meets_the_golden(released: DeltaLlavaProjector, case: str) -> None:
    output = recorded_run(released, case)["output"]
    assert difference(output, goldens.expected(case)["output"]) <= TOLERANCE


@pytest.mark.parametrize("case", goldens.CASES)
def test_bfloat16_meets_the_golden(case: str) -> None:
    module = DeltaLlavaProjector(clip_large_config(hidden=MANIFEST["geometry"]["hidden_size"]))
    module.load_state_dict(names.package_state_dict(goldens.weights()))
    single, levels = golden_inputs(case, torch.bfloat16)
    with torch.no_grad():
        output = module.to(torch.bfloat16).eval()(single, levels, scale_factor_of(case))
    assert output.dtype == torch.bfloat16
    assert difference(output, goldens.expected(case)["output"]) <= BFLOAT16_TOLERANCE


# ---------------------------------------------------------------------------- any size, any scale factor


def assert_meets_oracle(config: DeltaLlavaConfig, scale_factor: int, batch: int = 2) -> None:
    module, weights = released_pair(config)
    inputs = drawn_inputs(config, batch)
    with torch.no_grad():
        output = module(inputs[0], inputs[1:], scale_factor)
    assert output.shape == (batch, config.num_visual_tokens(scale_factor), config.text_config.hidden_size)
    assert difference(output, oracle_output(config, weights, inputs, scale_factor)) <= FLOAT64_TOLERANCE


@pytest.mark.parametrize("scale_factor", CLIP_LARGE_BUDGETS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_scale_factor_meets_the_oracle(scale_factor: int, attention: str) -> None:
    assert_meets_oracle(projector_config(attention=attention), scale_factor)


@pytest.mark.parametrize(
    "sizes, scale_factor",
    [
        ({"grid": 16}, 2),
        ({"grid": 16}, 16),
        ({"grid": 27}, 3),
        ({"grid": 27}, 9),
        ({"grid": 7}, 7),
        ({"grid": 1}, 1),
        ({"grid": 12, "width": 96}, 4),
        ({"grid": 12, "width": 96, "projector_head_dim": 32}, 3),
        ({"grid": 9, "width": 144, "projector_head_dim": 16}, 3),
        ({"grid": 6, "width": 256, "projector_head_dim": 32}, 2),
        ({"grid": 6, "width": 1152, "levels": 1, "projector_head_dim": 32}, 3),
        ({"grid": 12, "levels": 1}, 2),
        ({"grid": 12, "levels": 2}, 2),
        ({"grid": 12, "levels": 4}, 3),
        ({"grid": 12, "levels": 5}, 4),
        ({"grid": 12, "delta_rank": 1}, 3),
        ({"grid": 12, "delta_rank": 32}, 3),
        ({"grid": 12, "projector_num_attention_heads": 4}, 2),
        ({"grid": 12, "projector_num_attention_heads": 32}, 2),
        ({"grid": 12, "projector_head_dim": 4}, 2),
        ({"grid": 12, "projector_mix_ratio": 0.25}, 2),
        ({"grid": 12, "projector_mix_ratio": 0.01}, 2),
        ({"grid": 12, "projector_mix_ratio": 0.99}, 2),
        ({"grid": 12, "projector_mlp_ratio": 3}, 2),
        ({"grid": 12, "hidden": 40}, 2),
    ],
    ids=str,
)
def test_other_sizes_meet_the_oracle(sizes: dict, scale_factor: int) -> None:
    assert_meets_oracle(projector_config(**sizes), scale_factor)


def test_attention_takes_three_quarters_of_the_channels_in_whole_heads() -> None:
    for width, head_dim, expected in ((1024, 32, 768), (1152, 32, 864), (768, 32, 576), (96, 32, 64), (64, 32, 32)):
        with torch.device("meta"):
            module = DeltaLlavaProjector(projector_config(width=width, projector_head_dim=head_dim))
        assert module.block.stem.out_features == expected, width


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 6])
def test_run_time_scale_factor_equals_the_configured_one(scale_factor: int) -> None:
    at_run_time, weights = released_pair(projector_config(grid=6, scale_factor=1))
    configured, _ = released_pair(projector_config(grid=6, scale_factor=scale_factor))
    single, *levels = drawn_inputs(at_run_time.config)
    assert torch.equal(at_run_time(single, levels, scale_factor), configured(single, levels))


def test_images_of_a_batch_do_not_see_each_other() -> None:
    module, _ = released_pair(projector_config(grid=6))
    single, *levels = drawn_inputs(module.config, batch=3)
    alone = [module(single[i : i + 1], [level[i : i + 1] for level in levels], 2) for i in range(3)]
    torch.testing.assert_close(module(single, levels, 2), torch.cat(alone), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------- sizes and counts


@pytest.mark.parametrize("scale_factor", CLIP_LARGE_BUDGETS)
def test_parameter_count_does_not_depend_on_the_scale_factor(scale_factor: int) -> None:
    with torch.device("meta"):
        module = DeltaLlavaProjector(clip_large_config(scale_factor=scale_factor))
    assert sum(parameter.numel() for parameter in module.parameters()) == 42_503_680


def test_parameter_count_of_the_goldens(released: DeltaLlavaProjector) -> None:
    assert sum(p.numel() for p in released.parameters()) == MANIFEST["geometry"]["parameter_count"]


def test_token_counts_of_clip_large() -> None:
    config = clip_large_config()
    assert {s: config.num_visual_tokens(s) for s in CLIP_LARGE_BUDGETS} == CLIP_LARGE_BUDGETS
    assert config.visual_token_budgets == tuple(CLIP_LARGE_BUDGETS.values())


def test_token_counts_of_other_towers() -> None:
    clip_224 = CLIPVisionConfig(
        num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, image_size=224, patch_size=14
    )
    assert DeltaLlavaConfig(vision_config=clip_224, scale_factor=2).image_seq_length == 64
    so400m = SiglipVisionConfig(
        num_hidden_layers=27, hidden_size=1152, num_attention_heads=16, image_size=384, patch_size=14
    )
    siglip = DeltaLlavaConfig(vision_config=so400m, scale_factor=3, vision_feature_select_strategy="full")
    assert siglip.grid_size == 27
    assert siglip.image_seq_length == 81


# ---------------------------------------------------------------------------- gradients and training


def gradients(scale_factor: int) -> dict[str, Tensor]:
    module, _ = released_pair(projector_config(grid=12, projector_drop_path=0.0))
    single, *levels = drawn_inputs(module.config)
    output = module.train()(single, levels, scale_factor)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    assert all(gradient.isfinite().all() for gradient in found.values())
    return found


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 12])
def test_every_gradient_is_finite(scale_factor: int) -> None:
    """Zero gradients have reasons: a softmax ignores what it adds to all scores, and one score altogether.

    So a bias that all keys share never learns; at scale factor 1 a window holds one key, and nothing on the way to the
    scores learns; with one query token (grid over scale factor) the block's attention scores do not either.
    """
    zero = set(KEY_BIASES)
    if scale_factor == 12:
        zero |= {f"block.attention.{role}_proj.{kind}" for role in "qk" for kind in ("weight", "bias")}
    found = gradients(scale_factor)
    largest = max(gradient.abs().max() for gradient in found.values())
    if scale_factor == 1:
        zero |= {name for name in found if name.startswith(("q_proj.", "k_proj.", "block."))}
        for name in ("window_attention.in_proj_weight", "window_attention.in_proj_bias"):
            query, key, value = found[name].chunk(3)
            assert max(query.abs().max(), key.abs().max()) <= 1e-12 * largest
            assert value.abs().max() > 1e-6 * largest
    for name, gradient in found.items():
        if name in zero:
            assert gradient.abs().max() <= 1e-12 * largest, name
        else:
            assert gradient.abs().max() > 1e-6 * largest, name


def test_gradients_are_those_of_the_oracle() -> None:
    module, weights = released_pair(projector_config(grid=6))
    inputs = [x.requires_grad_() for x in drawn_inputs(module.config)]
    weights = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    direction = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (module(inputs[0], inputs[1:], 2) * direction).sum().backward()
    from_module = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    (oracle_output(module.config, weights, inputs, 2) * direction).sum().backward()
    for x, gradient in zip(inputs, from_module, strict=True):
        assert difference(gradient, x.grad) <= FLOAT64_TOLERANCE
    parameters = dict(module.named_parameters())
    for name, tensor in names.package_state_dict({name: tensor.grad for name, tensor in weights.items()}).items():
        if name not in KEY_BIASES:  # zero but for rounding
            assert difference(parameters[name].grad, tensor) <= 10 * FLOAT64_TOLERANCE, name


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


# ---------------------------------------------------------------------------- ablations of Table 3


def test_without_emhsa_the_block_has_no_global_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = projector_config(grid=6)
    _, weights = released_pair(config)
    ablated = DeltaLlavaProjector(projector_config(grid=6, use_emhsa=False)).double().eval()
    load_subset(ablated, weights, absent=("block.attention_norm.", "block.attention."))
    monkeypatch.setattr(oracle, "global_attention", lambda w, x, head_dim: torch.zeros_like(x))
    assert_ablation_meets_oracle(ablated, weights)


def test_without_the_block_queries_go_from_interpolation_to_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    config = projector_config(grid=6)
    _, weights = released_pair(config)
    ablated = DeltaLlavaProjector(projector_config(grid=6, use_transformer_block=False)).double().eval()
    load_subset(ablated, weights, absent=("block.",))
    monkeypatch.setattr(oracle, "refinement_block", lambda w, x: {"query_after_ntb": x})
    assert_ablation_meets_oracle(ablated, weights)


def test_without_delta_projection_there_is_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    config = projector_config(grid=6)
    _, weights = released_pair(config)
    ablated = DeltaLlavaProjector(projector_config(grid=6, use_delta_projection=False)).double().eval()
    load_subset(ablated, weights, absent=tuple(f"{r}_proj.delta_{f}" for r in "qkv" for f in "uv"))
    monkeypatch.setattr(oracle, "effective_weight", lambda base, u, v: base)
    assert_ablation_meets_oracle(ablated, weights)


def load_subset(module: nn.Module, weights: dict[str, Tensor], absent: tuple[str, ...]) -> None:
    """Loads all weights but those under `absent`, strictly: the ablated module has no parameter for them."""
    state = names.package_state_dict(weights)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(absent)}
    assert len(kept) < len(state)
    module.load_state_dict(kept)


def assert_ablation_meets_oracle(module: DeltaLlavaProjector, weights: dict[str, Tensor]) -> None:
    inputs = drawn_inputs(module.config)
    for scale_factor in (1, 2, 3, 6):
        expected = oracle_output(module.config, weights, inputs, scale_factor)
        with torch.no_grad():
            output = module(inputs[0], inputs[1:], scale_factor)
        assert difference(output, expected) <= FLOAT64_TOLERANCE, scale_factor


# ---------------------------------------------------------------------------- state dict


def test_state_dict_has_exactly_the_published_tensors(released: DeltaLlavaProjector) -> None:
    entries = {
        e["name"].removeprefix(goldens.PREFIX): torch.empty(e["shape"], device="meta") for e in MANIFEST["parameters"]
    }
    expected = {name: tuple(tensor.shape) for name, tensor in names.package_state_dict(entries).items()}
    assert {name: tuple(tensor.shape) for name, tensor in released.state_dict().items()} == expected
    assert set(dict(released.named_parameters())) == set(expected)


def test_low_rank_factors_are_parameters_of_their_own(released: DeltaLlavaProjector) -> None:
    for projection in (released.q_proj, released.k_proj, released.v_proj):
        assert isinstance(projection, DeltaProjection)
        for name in ("weight", "delta_u", "delta_v"):
            assert type(getattr(projection, name)) is nn.Parameter
        assert not any(isinstance(module, nn.Linear) for module in projection.modules())
    assert type(released.window_attention.in_proj_weight) is nn.Parameter
    assert not any(isinstance(module, nn.MultiheadAttention) for module in released.modules())


def test_state_dict_survives_safetensors(tmp_path) -> None:
    module, _ = released_pair(projector_config(grid=6), torch.float32)
    save_file(module.state_dict(), tmp_path / "projector.safetensors")
    other = DeltaLlavaProjector(module.config).eval()
    other.load_state_dict(load_file(tmp_path / "projector.safetensors"))
    single, *levels = drawn_inputs(module.config, dtype=torch.float32)
    assert torch.equal(other(single, levels, 2), module(single, levels, 2))


# ---------------------------------------------------------------------------- refused inputs


def test_bad_inputs_are_refused_by_name() -> None:
    module, _ = released_pair(projector_config(grid=6))
    single, *levels = drawn_inputs(module.config)
    with pytest.raises(ValueError, match="square grid of patches, and got 35"):
        module(single[:, 1:], [level[:, 1:] for level in levels], 1)
    with pytest.raises(ValueError, match="vision_feature_levels"):
        module(single, levels[:-1], 1)
    with pytest.raises(ValueError, match="scale_factor=4"):
        module(single, levels, 4)


# ---------------------------------------------------------------------------- the attention interface


def test_emhsa_goes_through_the_attention_interface() -> None:
    calls = []

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs) -> tuple[Tensor, None]:
        calls.append((query.shape, key.shape))
        return eager_attention_forward(module, query, key, value, mask, **kwargs)

    config = projector_config(grid=6, attention="spy")
    AttentionInterface.register("spy", spy)
    try:
        assert_meets_oracle(config, 2)
    finally:
        AttentionInterface._global_mapping.pop("spy")
    assert calls == [((2, 3, 9, 8), (2, 3, 9, 8))]


# ---------------------------------------------------------------------------- construction on the meta device


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
        filled = DeltaLlavaProjector(module.config)
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
    """Linear maps have a deviation of 0.02; factors and packed projection are Xavier-uniform, convolutions PyTorch's."""
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
    for name in ("q_proj.delta_u", "k_proj.delta_u", "v_proj.delta_v", "window_attention.in_proj_weight"):
        bound = (6 / sum(parameters[name].shape)) ** 0.5
        assert 0.9 * bound < parameters[name].abs().max().item() <= bound, name
    conv = parameters["block.conv_attention.group_conv.weight"]
    assert 0.9 * (9 * 8) ** -0.5 < conv.abs().max().item() <= (9 * 8) ** -0.5
