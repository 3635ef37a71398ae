"""Fewer visual tokens by other means: one tower and one language model, from the image to 30 new tokens.

    python -m benchmarks.against_pruning

LLaVA with all 576 patches; its patches averaged, drawn at random, or selected by the attention of the class token (as VisionZip
selects its dominant tokens; it merges the rest, which is left out here) to as many tokens as Delta-LLaVA makes. Weights are random, so this
is about speed: a token that is not there costs nothing, whatever removed it, and what is left is the cost of choosing or making the others.
FastV removes tokens inside the language model and is not measured: its authors report 45 % fewer FLOPs for LLaVA-1.5-13B.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.harness import arguments_of, peak_bytes, prepare, print_table, side_by_side, write_results
from benchmarks.harness.models import LLAVA, build_pair, make_inputs


def main() -> None:
    """Measure all in turns, print, write."""
    parser = arguments_of("Time ways to have fewer visual tokens.", seconds=240.0)
    parser.add_argument("--shape", default="0.5b", help="0.5b, 7b, 13b, or tiny to try the script")
    parser.add_argument("--budgets", type=int, nargs="+", default=[144, 64, 16])
    parser.add_argument("--text-tokens", type=int, default=68)
    parser.add_argument("--new-tokens", type=int, default=30)
    arguments = parser.parse_args()
    prepare(arguments)
    ours, llava = build_pair(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    most = ours.config.num_visual_tokens_for(1)

    sides: dict[str, tuple[Any, int, Callable | None]] = {f"{LLAVA}, {most}": (llava, most, None)}
    for budget in arguments.budgets:
        for name, reduce in METHODS.items():
            sides[f"{name}, {budget}"] = llava, budget, reduce
        sides[f"Delta-LLaVA, {budget}"] = ours, budget, None
    first = {name: partial(answer, *side, arguments.text_tokens, 1) for name, side in sides.items()}
    whole = {name: partial(answer, *side, arguments.text_tokens, arguments.new_tokens) for name, side in sides.items()}
    seconds = side_by_side({**{f"first {name}": call for name, call in first.items()}, **whole}, arguments)
    base = seconds[f"first {LLAVA}, {most}"]
    rows = []
    for name in sides:
        with FlopCounterMode(display=False) as counter:
            first[name]()
        rest = seconds[name] - seconds[f"first {name}"]
        rows.append(
            {
                "visual tokens": name,
                "time to first token, s": seconds[f"first {name}"],
                f"of {LLAVA}": seconds[f"first {name}"] / base,
                "tokens/s after it": (arguments.new_tokens - 1) / rest,
                "GFLOPs to it": counter.get_total_flops() / 1e9,
                "peak memory, MB": peak_bytes(first[name], arguments.device) / 1e6,
            }
        )
    print_table(f"Batch 1, {arguments.text_tokens} text tokens, {arguments.shape}, {arguments.dtype}", rows)
    print(write_results("against_pruning", arguments, rows=rows))


@torch.inference_mode()
def answer(model: Any, budget: int, reduce: Callable | None, text_tokens: int, new_tokens: int) -> None:
    """Generate exactly `new_tokens`; with `reduce`, transformers' LLaVA sees what it leaves of the patches."""
    inputs = make_inputs(model, budget, text_tokens, 1)
    if hasattr(model.config, "visual_token_budgets"):
        inputs["num_visual_tokens"] = budget
    original = model.model.get_image_features
    if reduce is not None:
        model.model.get_image_features = partial(reduced_features, model.model, reduce, budget)
    try:
        model.generate(**inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    finally:
        model.model.get_image_features = original


def reduced_features(
    model: Any, reduce: Callable, budget: int, pixel_values: torch.Tensor, **kwargs: Any
) -> BaseModelOutputWithPooling:
    """The visual tokens of LLaVA's own projector, of fewer patches."""
    seen: dict[str, torch.Tensor] = {}
    attention = model.vision_tower.encoder.layers[model.config.vision_feature_layer].self_attn
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(hidden=kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    states = model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    hook.remove()
    patches = states[model.config.vision_feature_layer][:, 1:]
    tokens = model.multi_modal_projector(reduce(patches, budget, attention, seen["hidden"]))
    return BaseModelOutputWithPooling(pooler_output=list(tokens))


def average(patches: torch.Tensor, budget: int, attention: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The mean of each square of patches."""
    side, cells = round(patches.shape[1] ** 0.5), round(budget**0.5)
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(grid, cells).flatten(2).transpose(1, 2)


def draw(patches: torch.Tensor, budget: int, attention: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Patches at random, in their order."""
    return patches[:, torch.randperm(patches.shape[1], device=patches.device)[:budget].sort().values]


def select(patches: torch.Tensor, budget: int, attention: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The patches to which the class token attends most in the layer that is read."""
    heads = attention.num_heads
    query = attention.q_proj(hidden[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = attention.k_proj(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0, 1:]
    chosen = weights.topk(budget).indices.sort().values
    return patches.gather(1, chosen.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


METHODS = {"averaged": average, "random": draw, "selected": select}


if __name__ == "__main__":
    main()
