"""Operations, memory and floors: against stored counts, PyTorch's allocator, gradients, and the paper's figures."""

from pathlib import Path

import pytest
import torch
from torch.profiler import profile as record
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from tests.tiny import TEXT, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.analysis import PARTS, paper_flops, profile_model, roofline, shape_config
from transformers_delta_llava.analysis.profile import (
    Counter,
    FusedAttention,
    language_costs,
    projector_costs,
    tower_costs,
)
from transformers_delta_llava.modeling import CACHE_NAME


def on_meta(config) -> DeltaLlavaForConditionalGeneration:
    with torch.device("meta"):
        return DeltaLlavaForConditionalGeneration(config).to("meta").eval()


# Operations.

PAPER_WINDOWS = {"projector_layout": "paper", "projector_window_size": 3, "projector_sr_ratio": 2}
SIGLIP = {"vision": {"model_type": "siglip_vision_model"}, "vision_feature_select_strategy": "full"}
# Counted by hand from the shapes: of the tower, of the projector at 144 and at 36 tokens, of the prefill of 36 visual and 10 other
# tokens, and of 5 steps of decoding after it.
COUNTS = {
    "clip and llama": ({}, (37749504, 7741440, 12072960, 3789696, 464640)),
    "siglip": (SIGLIP, (37380096, 7741440, 12072960, 3789696, 464640)),
    # An MLP as wide as that of the CLIP above, so the same.
    "dinov2": ({"vision": {"model_type": "dinov2", "mlp_ratio": 1}}, (37749504, 7741440, 12072960, 3789696, 464640)),
    "dinov2 with registers": (
        {"vision": {"model_type": "dinov2_with_registers", "mlp_ratio": 1}},
        (39242496, 7741440, 12072960, 3789696, 464640),
    ),
    "deepest level first": (
        {"vision_feature_levels": [3, 1], "vision_feature_layer": 2},
        (37749504, 6488064, 9566208, 3789696, 464640),
    ),
    "qwen": ({"text": {"model_type": "qwen2"}}, (37749504, 7741440, 12072960, 3789696, 464640)),
    "phi, one matrix for several": (
        {"text": {"model_type": "phi3", "bos_token_id": 1}},
        (37749504, 7741440, 12072960, 3789696, 464640),
    ),
    "no deltas": ({"use_delta_projection": False}, (37749504, 7446528, 11446272, 3789696, 464640)),
    "no block": ({"use_transformer_block": False}, (37749504, 7741440, 9603072, 3789696, 464640)),
    "no global attention": ({"use_emhsa": False}, (37749504, 7741440, 11160576, 3789696, 464640)),
    "four heads": ({"projector_num_attention_heads": 4}, (37749504, 7741440, 12183552, 3789696, 464640)),
    "paper": ({"projector_layout": "paper"}, (37749504, 42135552, 14598144, 3789696, 464640)),
    "paper, one base": (
        {"projector_layout": "paper", "delta_sharing": "all"},
        (37749504, 42135552, 14598144, 3789696, 464640),
    ),
    "paper, windows, reduced keys": (PAPER_WINDOWS, (37749504, 31518720, 14100480, 3789696, 464640)),
}


@pytest.mark.parametrize("case", COUNTS)
def test_operations(case: str) -> None:
    fields, (tower, largest, smallest, prefill, decode) = COUNTS[case]
    model = on_meta(tiny_config(**{"projector_head_dim": 8, "delta_rank": 4, **fields}))
    assert tower_costs(model)[0] == tower
    projector = model.model.multi_modal_projector
    assert [projector_costs(projector, scale_factor)[0] for scale_factor in (1, 2)] == [largest, smallest]
    language = language_costs(model, 46, 6)
    # transformers up to 5.16 multiplies the angles of rotary positions as matrices: 0.02 % of so small a model.
    assert (language.prefill_flops, language.decode_flops) == pytest.approx((prefill, decode), rel=1e-3)
    assert language.cache_bytes == 2 * 2 * 46 * 2 * 12 * 4  # keys and values, layers, tokens, heads, channels, bytes


def test_operations_without_fused_attention_are_the_same() -> None:
    """What real tensors and attention written out as products need, one decoding step after the other."""
    model = DeltaLlavaForConditionalGeneration(tiny_config(projector_head_dim=8)).eval()
    model.set_attn_implementation("eager")
    pixels, embeds = torch.randn(1, 3, 24, 24), torch.randn(1, 21, TEXT["hidden_size"])
    cache = model(inputs_embeds=embeds, use_cache=True)[CACHE_NAME]

    def decode() -> None:
        for _ in range(4):
            model(inputs_embeds=embeds[:, :1], use_cache=True, **{CACHE_NAME: cache})

    counts = []
    for function in (
        lambda: model.model.get_patch_features(pixels),
        lambda: model(inputs_embeds=embeds, logits_to_keep=1),
        decode,
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    meta = on_meta(model.config)
    language = language_costs(meta, 21, 5)
    assert [tower_costs(meta)[0], language.prefill_flops, language.decode_flops] == pytest.approx(counts, rel=1e-3)


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


# Memory.


def test_memory_is_counted_while_it_is_held() -> None:
    x = torch.empty(1000, device="meta")
    kept = []

    def chain() -> torch.Tensor:
        y = x + 1  # 4 kB
        z = y * 2  # 8 kB in all
        del y
        w = z.view(10, 100).T  # a view holds nothing of its own
        return w.add_(1)

    counter = Counter()
    assert counter.measure(chain)[1] == 8000
    assert counter.measure(lambda: kept.append(x + 1))[1] == 4000
    assert counter.measure(chain)[1] == 8000, "what is held from before does not count"
    assert counter.held_bytes() == 4000


def test_attention_is_fused() -> None:
    q = torch.empty(1, 2, 64, 8, device="meta")
    attention = torch.nn.functional.scaled_dot_product_attention
    assert Counter().measure(lambda: attention(q, q, q)) == (2 * 2 * 2 * 64 * 64 * 8, q.nbytes)


def allocated(function) -> int:
    """Peak of what PyTorch's allocator gives out during a call on real tensors."""
    with torch.no_grad(), FusedAttention(), record(profile_memory=True) as recorded:
        function()
    total = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@pytest.mark.parametrize("layout", ["released", "paper"])
def test_memory_is_what_the_allocator_gives_out(layout: str) -> None:
    config = tiny_config(projector_layout=layout)
    model, meta = DeltaLlavaForConditionalGeneration(config).eval(), on_meta(config)
    pixels, features, embeds = (
        torch.randn(1, 3, 24, 24),
        torch.randn(1, 144, 64),
        torch.randn(1, 50, TEXT["hidden_size"]),
    )
    assert allocated(lambda: model.model.get_patch_features(pixels)) == tower_costs(meta)[1]
    for scale_factor in (1, 2, 12):
        expected = allocated(lambda s=scale_factor: model.model.multi_modal_projector(features, [features] * 3, s))
        assert projector_costs(meta.model.multi_modal_projector, scale_factor)[1] == expected
    cache = DynamicCache()

    def run(tokens: torch.Tensor) -> None:
        outputs = model.model.language_model(inputs_embeds=tokens, use_cache=True, **{CACHE_NAME: cache})
        model.lm_head(outputs.last_hidden_state[:, -1:])

    costs = language_costs(meta, 50, 2)
    assert allocated(lambda: run(embeds)) == costs.prefill_bytes + costs.cache_bytes
    assert allocated(lambda: run(embeds[:, :1])) == costs.decode_bytes


# The profile.


def test_profile_of_a_small_model() -> None:
    config = tiny_config()
    result = profile_model(config, text_tokens=10, new_tokens=6, dtype=torch.float32)
    model = DeltaLlavaForConditionalGeneration(config).eval()
    assert sum(result.parameters.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert [b.num_visual_tokens for b in result.budgets] == list(config.visual_token_budgets)
    for budget in result.budgets:
        assert set(budget.exact_flops) == set(budget.paper_flops) == set(budget.activation_bytes) == set(PARTS)
        # Keys and values, layers, tokens, heads, channels, bytes.
        assert budget.kv_cache_bytes == 2 * 2 * (10 + budget.num_visual_tokens + 5) * 2 * 12 * 4


def test_published_sizes_have_their_parameters() -> None:
    counts = {s: sum(p.numel() for p in on_meta(shape_config(s)).parameters()) for s in ("0.5b", "7b", "13b")}
    assert {s: round(count / 1e9, 2) for s, count in counts.items()} == {"0.5b": 0.82, "7b": 7.08, "13b": 13.37}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [7]}, "num_visual_tokens=7"),
        ({"text_tokens": -1}, "text_tokens=-1: use a number from 0"),
        ({"new_tokens": 0}, "new_tokens=0: use a number from 1"),
        ({"text_tokens": 10**20}, "use a number from"),
        ({"new_tokens": 10**20}, "use a number from"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_model(tiny_config(), **options)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape='70b': use one of 0.5b, 7b, 13b"):
        shape_config("70b")


# Floors.


def test_each_part_takes_the_longer_of_its_two_times() -> None:
    profile = profile_model(tiny_config(), text_tokens=10, new_tokens=4, dtype=torch.float32, budgets=[36])
    (budget,) = profile.budgets
    (memory,) = roofline(profile, 1e30, 1e6, batch_size=2)
    assert set(memory.limited_by.values()) == {"memory"}
    per_token = budget.kv_cache_bytes / (46 + 3)  # the cache ends with 46 tokens of the prompt and 3 of the answer
    read = 3 * budget.weight_bytes["decode"] + 2 * per_token * (47 + 48 + 49)
    assert memory.seconds["decode"] == pytest.approx(read / 1e6)
    assert memory.per_token == pytest.approx(read / 3e6)
    assert memory.seconds["tower"] == pytest.approx(budget.weight_bytes["tower"] / 1e6)  # once, whatever the batch
    (compute,) = roofline(profile, 1e6, 1e30, batch_size=2)
    assert set(compute.limited_by.values()) == {"compute"}
    assert compute.seconds == {part: pytest.approx(2 * flops / 1e6) for part, flops in budget.exact_flops.items()}
    assert compute.first_token == pytest.approx(sum(compute.seconds.values()) - compute.seconds["decode"])
    for name, rates in (("bytes_per_second=0", (1e12, 0)), ("batch_size=-1", (1e12, 1e12, -1))):
        with pytest.raises(ValueError, match=f"{name}: it must be above 0"):
            roofline(profile, *rates)


@pytest.mark.parametrize("layout", ["released", "paper"])
def test_weights_that_are_read_are_those_that_gradients_reach(layout: str) -> None:
    """A parameter that the output depends on has a gradient; at one key per window that is shown without the shortcut."""
    config = tiny_config(projector_layout=layout)
    model = DeltaLlavaForConditionalGeneration(config).eval()
    budgets = {b.num_visual_tokens: b for b in profile_model(config, dtype=torch.float32, budgets=[144, 36]).budgets}
    pixels = torch.randn(1, 3, 24, 24)
    for tokens in (144, 36):
        model.zero_grad()
        model.get_image_features(pixels, tokens).pooler_output[0].square().sum().backward()
        for name, part in (("tower", model.model.vision_tower), ("projector", model.model.multi_modal_projector)):
            reached = [p for p in part.parameters() if p.grad is not None and p.grad.any()]
            counted = 4 * sum(p.numel() for p in reached)
            if name == "projector" and tokens == 144 and layout == "released":
                attention = model.model.multi_modal_projector.window_attention
                packed = attention.in_proj_weight.numel() + attention.in_proj_bias.numel()
                counted -= 4 * packed * 2 // 3  # a third of the packed rows makes values
            # The class token's embedding, or what position embeddings give it, may be all that gradients miss.
            assert budgets[tokens].weight_bytes[name] == pytest.approx(counted, rel=0.02), (name, tokens)


def test_the_pages_give_operations_and_floors_of_a_7b_model() -> None:
    profile = profile_model(shape_config("7b"), budgets=[576, 144, 36, 1])
    docs = Path(__file__).parents[2] / "docs"
    page = " ".join((docs / "performance.md").read_text(encoding="utf-8").split())
    exact = [f"{sum(budget.exact_flops.values()) / 1e12:.2f}" for budget in profile.budgets]
    paper = [f"{sum(budget.paper_flops.values()) / 1e12:.2f}" for budget in profile.budgets]
    projector = [f"{budget.exact_flops['projector'] / 1e12:.4f}" for budget in profile.budgets]
    assert f"{exact[0]} TFLOPs at 576 visual tokens, {exact[1]} at 144 and {exact[3]} at 1." in page
    assert f"gives {paper[0]}, {paper[1]} and {paper[3]}" in page
    assert f"({projector[0]} and {projector[1]} here)" in page

    single, batched = roofline(profile, 7e14, 3.35e12), roofline(profile, 7e14, 3.35e12, batch_size=32)
    page = (docs / "budgets.md").read_text(encoding="utf-8")
    for one, many in zip(single, batched):
        times = (one.first_token, many.first_token, one.per_token or 0, many.per_token or 0)
        assert " | ".join((f"| {one.num_visual_tokens}", *(f"{1000 * seconds:.2f}" for seconds in times))) in page
    # The first token of short prompts waits for the weights, 3.9 ms of them.
    assert f"take\n{1000 * single[-1].seconds['prefill']:.1f} ms on an H100" in page
    assert [floor.limited_by["prefill"] for floor in single] == ["compute", "compute", "memory", "memory"]


def test_an_answer_of_one_token_has_no_steps_of_decoding() -> None:
    (floor,) = roofline(profile_model(tiny_config(), new_tokens=1, budgets=[1]), 1e12, 1e12)
    assert floor.per_token is None and floor.seconds["decode"] == 0
