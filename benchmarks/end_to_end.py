"""Answers of a whole model at every budget, compared with transformers' own LLaVA with the same tower and language model.

    python -m benchmarks.end_to_end
    python -m benchmarks.end_to_end --device cuda --dtype bfloat16 --shape 7b --batch-size 1 --new-tokens 128
    python -m benchmarks.end_to_end --device cuda --dtype bfloat16 --shape 7b --batch-size 32 --new-tokens 128 --cache static
    python -m benchmarks.end_to_end --device cuda --dtype bfloat16 --shape 13b --new-tokens 128

Weights are random, and an answer always has the same length. `promised` is the share of LLaVA's operations up to the first token,
exact counts of both, that is left at a budget: the time to first token should follow it.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.harness import arguments_of, peak_bytes, prepare, print_table, side_by_side, write_results
from benchmarks.harness.models import LLAVA, build_pair, make_inputs
from benchmarks.profile import paper_flops, profile
from transformers_delta_llava import DeltaLlavaConfig


def main() -> None:
    """Measure LLaVA and every budget in turns, print, write."""
    parser = arguments_of("Time answers and LLaVA's.", seconds=120.0)
    parser.add_argument("--shape", default="0.5b", help="0.5b, 7b, 13b, or tiny to try the script")
    parser.add_argument("--budgets", type=int, nargs="+", help="all that the grid gives by default")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=68)
    parser.add_argument("--new-tokens", type=int, default=30)
    parser.add_argument(
        "--cache", choices=["dynamic", "static"], default="dynamic", help="static: decoding is compiled"
    )
    arguments = parser.parse_args()
    prepare(arguments)
    ours, llava = build_pair(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    budgets = arguments.budgets or [b for b in ours.config.visual_token_budgets if b != 9]
    most = ours.config.num_visual_tokens_for(1)
    models = {LLAVA: (llava, most), **{f"{budget} tokens": (ours, budget) for budget in budgets}}
    first, whole = {}, {}
    for name, (model, budget) in models.items():
        inputs = make_inputs(model, budget, arguments.text_tokens, arguments.batch_size)
        if model is ours:
            inputs["num_visual_tokens"] = budget
        first[name] = partial(answer, model, inputs, 1, arguments.cache)
        whole[name] = partial(answer, model, inputs, arguments.new_tokens, arguments.cache)
    seconds = side_by_side({**{f"first {n}": f for n, f in first.items()}, **whole}, arguments)
    promised = promises(ours.config, budgets, arguments.text_tokens)
    rows = []
    for name in models:
        to_first, total = seconds[f"first {name}"], seconds[name]
        rows.append(
            {
                "model": name,
                "first token, ms": 1000 * to_first,
                "of LLaVA's": to_first / seconds[f"first {LLAVA}"],
                "promised": promised[name],
                "per token, ms": 1000 * (total - to_first) / (arguments.new_tokens - 1),
                "tokens/s": arguments.batch_size * arguments.new_tokens / total,
                "gain": seconds[LLAVA] / total - 1,
                "MB, first token": peak_bytes(first[name], arguments.device) / 1e6,
            }
        )
    print_table(f"{arguments.shape}, batch {arguments.batch_size}, {arguments.new_tokens} new tokens", rows)
    name = f"end_to_end_{arguments.shape}_{arguments.device}_batch{arguments.batch_size}_{arguments.cache}"
    write_results(name, arguments, rows=rows)


@torch.no_grad()
def answer(model: Any, inputs: dict[str, Any], new_tokens: int, cache: str) -> torch.Tensor:
    """Greedy tokens, as many as asked."""
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    return model.generate(
        **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
    )


def promises(config: DeltaLlavaConfig, budgets: list[int], text_tokens: int) -> dict[str, float]:
    """Operations up to the first token as a share of LLaVA's, which runs the whole tower and keeps every patch."""
    most = config.num_visual_tokens_for(1)
    full, *others = profile(config, text_tokens, 1, [most, *budgets])
    shared = paper_flops(config, most, text_tokens, 1)  # of a whole CLIP and of LLaVA's MLP it is the exact count
    llava = shared["tower"] + shared["projector"] + full["flops"]["prefill"]
    return {LLAVA: 1.0, **{f"{row['num_visual_tokens']} tokens": sum(row["flops"].values()) / llava for row in others}}


if __name__ == "__main__":
    main()
