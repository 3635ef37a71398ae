"""Counts against PyTorch's counter on a small model, and against the paper's figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import TEXT, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.analysis import PARTS, paper_flops, profile_model, shape_config
from transformers_delta_llava.analysis.profile import decode_flops, prefill_flops, projector_flops, tower_flops
from transformers_delta_llava.modeling import CACHE_NAME


SIGLIP = {
    "vision": {"model_type": "siglip_vision_model"},
    "vision_feature_select_strategy": "full",
}
CASES = {
    "clip and llama": {},
    "siglip": SIGLIP,
    "deepest level first": {"vision_feature_levels": [3, 1], "vision_feature_layer": 2},
    "qwen": {"text": {"model_type": "qwen2"}},
    "phi, one matrix for several": {"text": {"model_type": "phi3", "bos_token_id": 1}},
    "no deltas": {"use_delta_projection": False},
    "no block": {"use_transformer_block": False},
    "no global attention": {"use_emhsa": False},
    "four heads": {"projector_num_attention_heads": 4},
    "paper": {"projector_layout": "paper"},
    "paper, one base": {"projector_layout": "paper", "delta_sharing": "all"},
    "paper, windows, reduced keys": {
        "projector_layout": "paper",
        "projector_window_size": 3,
        "projector_sr_ratio": 2,
    },
}


def in_place_product(result: torch.Size, left: torch.Size, right: torch.Size, out_shape=None, **kwargs) -> int:
    """Of `addmm_`, which PyTorch's counter leaves out."""
    return 2 * left[0] * left[1] * right[1]


def counted(function) -> int:
    mapping = {torch.ops.aten.addmm_: in_place_product}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES)
def test_exact_counts_are_those_of_the_counter(case: str) -> None:
    fields = {"projector_head_dim": 8, "delta_rank": 4, **CASES[case]}
    model = DeltaLlavaForConditionalGeneration(tiny_config(**fields)).eval()
    model.set_attn_implementation("eager")
    config, inner = model.config, model.model
    pixels, embeds = torch.randn(1, 3, 24, 24), torch.randn(1, 21, TEXT["hidden_size"])
    assert tower_flops(model) == counted(lambda: inner._run_vision_tower(pixels))

    features = torch.randn(1, 144, config.vision_config.hidden_size)
    levels = [features] * len(config.vision_feature_levels)
    for budget in config.visual_token_budgets:
        s = config.scale_factor_for(budget)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            expected = counted(lambda s=s: inner.multi_modal_projector(features, levels, s))
        assert projector_flops(inner.multi_modal_projector, s) == expected, s

    outputs = model(inputs_embeds=embeds, logits_to_keep=1, use_cache=True)
    # Older releases of transformers multiply the angles of rotary positions as matrices: 0.02 % of so small a model.
    expected = counted(lambda: model(inputs_embeds=embeds, logits_to_keep=1))
    assert prefill_flops(model, 21) == pytest.approx(expected, rel=1e-3)

    def decode() -> None:
        for _ in range(4):
            model(inputs_embeds=embeds[:, :1], use_cache=True, cache=outputs[CACHE_NAME])

    assert decode_flops(model, 21, 5) == pytest.approx(counted(decode), rel=1e-3)


# Figure 3 and section 6.5, TFLOPs.
PAPER = [
    (576, {"tower": 0.382, "projector": 0.024, "prefill": 6.72, "total": 7.43}),
    (144, {"tower": 0.382, "projector": 0.0015, "prefill": 2.16, "total": 2.84}),
    (36, {"tower": 0.382, "total": 1.74}),
    (16, {"tower": 0.382, "prefill": 0.85}),
    (1, {"tower": 0.382, "prefill": 0.70, "total": 1.39}),
]


@pytest.mark.parametrize("budget, published", PAPER)
def test_the_papers_formula_gives_the_papers_figures(budget: int, published: dict[str, float]) -> None:
    counts = paper_flops(shape_config("7b"), budget, text_tokens=68, new_tokens=30)
    counts["total"] = sum(counts.values())
    for part, figure in published.items():
        assert counts[part] / 1e12 == pytest.approx(figure, rel=0.015), part


def test_profile_of_a_small_model() -> None:
    config = tiny_config()
    result = profile_model(config, text_tokens=10, new_tokens=6, dtype=torch.float32)
    model = DeltaLlavaForConditionalGeneration(config).eval()
    assert sum(result.parameters.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert [b.num_visual_tokens for b in result.budgets] == list(config.visual_token_budgets)
    for budget in result.budgets:
        assert set(budget.exact_flops) == set(budget.paper_flops) == set(budget.activation_bytes) == set(PARTS)
    first = result.budgets[0]
    embeds = torch.randn(1, 10 + 144, TEXT["hidden_size"])
    cache = model(inputs_embeds=embeds, use_cache=True)[CACHE_NAME]
    for _ in range(5):
        model(inputs_embeds=embeds[:, :1], cache=cache, use_cache=True)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert first.kv_cache_bytes == held


def test_published_sizes_have_their_parameters() -> None:
    with torch.device("meta"):
        counts = {
            shape: sum(p.numel() for p in DeltaLlavaForConditionalGeneration(shape_config(shape)).parameters())
            for shape in ("0.5b", "7b", "13b")
        }
    assert {shape: round(count / 1e9, 2) for shape, count in counts.items()} == {
        "0.5b": 0.82,
        "7b": 7.08,
        "13b": 13.37,
    }


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="shape='70b': use one of 0.5b, 7b, 13b"):
        shape_config("70b")
    with pytest.raises(ValueError, match="num_visual_tokens=7"):
        profile_model(tiny_config(), budgets=[7])


@pytest.mark.parametrize(
    "lengths", [{"text_tokens": -1}, {"new_tokens": 0}, {"text_tokens": 10**20}, {"new_tokens": 10**20}]
)
def test_lengths_that_no_model_has_are_refused(lengths):
    with pytest.raises(ValueError, match="use a number from"):
        profile_model(tiny_config(), **lengths)
