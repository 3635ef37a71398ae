"""Operations against counts by hand, real tensors and the paper's figures."""

import pytest
import torch

from benchmarks.profile import count_flops, language_flops, paper_flops, profile, projector_flops, tower_flops
from benchmarks.shapes import model_config
from tests.tiny import TEXT, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.modeling import CACHE_NAME


SIGLIP = {"vision": {"model_type": "siglip_vision_model"}, "vision_feature_select_strategy": "full"}
# Counted by hand from the shapes: of the tower, of the projector at 144 and at 36 tokens, of the prefill of 36 visual and 10 other
# tokens, and of 5 steps of decoding after it.
COUNTS = {
    "clip and llama": ({}, (37749504, 7741440, 12072960, 3789696, 464640)),
    "siglip": (SIGLIP, (37380096, 7741440, 12072960, 3789696, 464640)),
    # An MLP as wide as that of the CLIP above, so the same.
    "dinov2": ({"vision": {"model_type": "dinov2", "mlp_ratio": 1}}, (37749504, 7741440, 12072960, 3789696, 464640)),
    "deepest level first": (
        {"vision_feature_levels": [3, 1], "vision_feature_layer": 2},
        (37749504, 6488064, 9566208, 3789696, 464640),
    ),
    "no deltas": ({"use_delta_projection": False}, (37749504, 7446528, 11446272, 3789696, 464640)),
    "no block": ({"use_transformer_block": False}, (37749504, 7741440, 9603072, 3789696, 464640)),
    "paper": ({"projector_layout": "paper"}, (37749504, 42135552, 14598144, 3789696, 464640)),
}


@pytest.mark.parametrize("case", COUNTS)
def test_operations(case: str) -> None:
    fields, (tower, largest, smallest, prefill, decode) = COUNTS[case]
    config = tiny_config(**{"projector_head_dim": 8, "delta_rank": 4, **fields})
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config).to("meta").eval()
    assert tower_flops(model) == tower
    projector = model.model.multi_modal_projector
    assert [projector_flops(projector, scale_factor) for scale_factor in (1, 2)] == [largest, smallest]
    # transformers up to 5.16 multiplies the angles of rotary positions as matrices: 0.02 % of so small a model.
    assert language_flops(model, 46, 6) == pytest.approx((prefill, decode), rel=1e-3)


def test_operations_are_those_of_real_tensors() -> None:
    model = DeltaLlavaForConditionalGeneration(tiny_config(projector_head_dim=8)).eval()
    model.set_attn_implementation("eager")
    pixels, embeds = torch.randn(1, 3, 24, 24), torch.randn(1, 21, TEXT["hidden_size"])
    cache = model(inputs_embeds=embeds, use_cache=True)[CACHE_NAME]

    def decode() -> None:
        for _ in range(4):
            model(inputs_embeds=embeds[:, :1], use_cache=True, **{CACHE_NAME: cache})

    counts = [
        count_flops(lambda: model.model.get_patch_features(pixels)),
        count_flops(lambda: model(inputs_embeds=embeds, logits_to_keep=1)),
        count_flops(decode),
    ]
    with torch.device("meta"):
        meta = DeltaLlavaForConditionalGeneration(model.config).to("meta").eval()
    assert [tower_flops(meta), *language_flops(meta, 21, 5)] == pytest.approx(counts, rel=1e-3)


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
    counts = paper_flops(model_config("7b"), budget, text_tokens=68, new_tokens=30)
    counts["total"] = sum(counts.values())
    for part, figure in published.items():
        assert counts[part] / 1e12 == pytest.approx(figure, rel=0.015), part


def test_a_7b_model_costs_what_the_documentation_says() -> None:
    totals = [sum(row["flops"].values()) / 1e12 for row in profile(model_config("7b"), budgets=[576, 144, 1])]
    assert totals == pytest.approx([9.35, 3.54, 1.66], abs=0.005)
