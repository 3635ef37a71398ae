"""Floors from counts: the arithmetic by hand on a small model, and what a 7B model's weights allow."""

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.analysis import profile_model, roofline, shape_config


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


@pytest.mark.parametrize("layout", ["released", "paper"])
def test_weights_that_are_read_are_those_that_gradients_reach(layout: str) -> None:
    """A parameter that the output depends on has a gradient; at one key per window that is shown without the shortcut."""
    config = tiny_config(projector_layout=layout)
    model = DeltaLlavaForConditionalGeneration(config).eval()
    budgets = {b.num_visual_tokens: b for b in profile_model(config, dtype=torch.float32).budgets}
    pixels = torch.randn(1, 3, config.vision_config.image_size, config.vision_config.image_size)
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


def test_the_page_gives_the_floors_of_a_7b_model() -> None:
    profile = profile_model(shape_config("7b"), budgets=[576, 144, 36, 1])
    single, batched = roofline(profile, 7e14, 3.35e12), roofline(profile, 7e14, 3.35e12, batch_size=32)
    page = (Path(__file__).parents[2] / "docs" / "budgets.md").read_text(encoding="utf-8")
    for one, many in zip(single, batched):
        times = (one.first_token, many.first_token, one.per_token or 0, many.per_token or 0)
        assert " | ".join((f"| {one.num_visual_tokens}", *(f"{1000 * seconds:.2f}" for seconds in times))) in page
    # The first token of short prompts waits for the weights, 3.9 ms of them.
    assert f"take\n{1000 * single[-1].seconds['prefill']:.1f} ms on an H100" in page
    assert [floor.limited_by["prefill"] for floor in single] == ["compute", "compute", "memory", "memory"]


def test_an_answer_of_one_token_has_no_steps_of_decoding() -> None:
    (floor,) = roofline(profile_model(tiny_config(), new_tokens=1, budgets=[1]), 1e12, 1e12)
    assert floor.per_token is None and floor.seconds["decode"] == 0


def test_rates_that_are_not_positive_are_refused() -> None:
    profile = profile_model(tiny_config(), budgets=[1])
    with pytest.raises(ValueError, match="bytes_per_second=0: it must be above 0"):
        roofline(profile, 1e12, 0)
    with pytest.raises(ValueError, match="batch_size=-1"):
        roofline(profile, 1e12, 1e12, -1)
