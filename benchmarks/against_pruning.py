"""Ways to fewer visual tokens around one tower and one language model: pooling, dropping, selecting, projecting.

    python -m benchmarks.against_pruning
    python -m benchmarks.against_pruning --device cuda --dtype bfloat16 --shape 7b --new-tokens 64

Weights are random: times, memory and operations only. Every side runs the same tower, up to the layers that are read; all but ours map
tokens with LLaVA's two-layer MLP. `VisionZip-style` follows arXiv 2412.04467: the patches that the class token attends to most, and
averages of the others, merged by the similarity of their keys, 54 to 10. FastV (arXiv 2403.06764) drops half of the visual tokens
after the language model's second layer; it is not measured here, and publishes 45 % fewer operations for LLaVA-1.5-13B.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize, one_hot
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.harness import arguments_of, peak_bytes, prepare, print_table, side_by_side, write_results
from benchmarks.harness.models import LLAVA, build_pair, make_inputs
from benchmarks.profile import count_flops
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


Reduce = Callable[[torch.Tensor, int], torch.Tensor]


def main() -> None:
    """Measure all in turns, print, write."""
    parser = arguments_of("Time ways to fewer visual tokens.", seconds=240.0)
    parser.add_argument("--shape", default="0.5b", help="0.5b, 7b, 13b, or tiny to try the script")
    parser.add_argument("--budgets", type=int, nargs="+", default=[144, 64, 16])
    parser.add_argument("--text-tokens", type=int, default=68)
    parser.add_argument("--new-tokens", type=int, default=30)
    arguments = parser.parse_args()
    prepare(arguments)
    ours, llava = build_pair(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    mlp = llava.model.multi_modal_projector
    reductions: dict[str, Reduce] = {"average pooling": pool, "random tokens": drop, "VisionZip-style": Zip(ours)}
    sides: dict[str, tuple[int, Callable]] = {LLAVA: (576, lambda pixels: list(mlp(patches(ours, pixels))))}
    for budget in arguments.budgets:
        for name, reduce in reductions.items():
            sides[f"{name}, {budget}"] = budget, partial(reduced, ours, mlp, reduce, budget)
        sides[f"Delta-LLaVA, {budget}"] = budget, partial(projected, ours, budget)

    first, whole = {}, {}
    for name, (budget, encode) in sides.items():
        inputs = make_inputs(ours, budget, arguments.text_tokens, 1)
        first[name] = partial(answer, ours, encode, inputs, 1)
        whole[name] = partial(answer, ours, encode, inputs, arguments.new_tokens)
    seconds = side_by_side({**{f"first {name}": call for name, call in first.items()}, **whole}, arguments)
    rows = [
        {
            "side": name,
            "first token, ms": 1000 * seconds[f"first {name}"],
            "of LLaVA's": seconds[f"first {name}"] / seconds[f"first {LLAVA}"],
            "tokens/s": arguments.new_tokens / seconds[name],
            "MB, first token": peak_bytes(first[name], arguments.device) / 1e6,
            "TFLOPs, first token": count_flops(first[name]) / 1e12,
        }
        for name in sides
    ]
    print_table(f"{arguments.shape}, batch 1, {arguments.new_tokens} new tokens", rows)
    write_results(f"against_pruning_{arguments.shape}_{arguments.device}", arguments, rows=rows)


@torch.inference_mode()
def answer(model: DeltaLlavaForConditionalGeneration, encode: Callable, inputs: dict[str, Any], length: int) -> Any:
    """Greedy tokens of one length; `encode` gives the visual tokens of pixel values."""
    tokens = {name: value for name, value in inputs.items() if name != "pixel_values"}
    visual = {"image": BaseModelOutputWithPooling(pooler_output=encode(inputs["pixel_values"]))}
    options: dict[str, Any] = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
    return model.generate(**tokens, mm_encoder_outputs=visual, pad_token_id=0, **options)


def projected(model: DeltaLlavaForConditionalGeneration, budget: int, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Ours: the projector makes the visual tokens."""
    return model.model.project_features(model.model.get_patch_features(pixels), budget)


def patches(model: DeltaLlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Features (images, patches, width) of the layer that LLaVA reads."""
    return model.model.get_patch_features(pixels).stream


def reduced(
    model: DeltaLlavaForConditionalGeneration, mlp: Any, reduce: Reduce, budget: int, pixels: torch.Tensor
) -> list[torch.Tensor]:
    """Fewer of the tower's patches, then LLaVA's MLP."""
    return list(mlp(reduce(patches(model, pixels), budget)))


def pool(features: torch.Tensor, budget: int) -> torch.Tensor:
    """Averages over windows of the grid."""
    side = round(features.shape[1] ** 0.5)
    grid = features.mT.unflatten(-1, (side, side))
    return adaptive_avg_pool2d(grid, round(budget**0.5)).flatten(-2).mT


def drop(features: torch.Tensor, budget: int) -> torch.Tensor:
    """Some of the patches, in their order."""
    return features[:, torch.randperm(features.shape[1], device=features.device)[:budget].sort().values]


class Zip:
    """VisionZip's selection, from queries and keys of the last of the tower's layers that run."""

    def __init__(self, model: DeltaLlavaForConditionalGeneration):
        attention = model.model.vision_tower.encoder.layers[model.config.vision_feature_layer - 1].self_attn
        self.head_dim = attention.head_dim
        self.states: dict[str, torch.Tensor] = {}
        for name in ("q_proj", "k_proj"):
            getattr(attention, name).register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.states[name] = output

    def __call__(self, features: torch.Tensor, budget: int) -> torch.Tensor:
        merged = max(1, round(budget * 10 / 64))
        query, keys = (self.states[name].unflatten(-1, (-1, self.head_dim)) for name in ("q_proj", "k_proj"))
        scores = torch.einsum("bhd,bnhd->bhn", query[:, 0], keys) / self.head_dim**0.5
        attention = scores.softmax(-1).sum(1)[:, 1:]  # of the class token, which comes first
        order = attention.argsort(dim=-1, descending=True)
        dominant, rest = (
            part.sort(-1).values for part in order.split([budget - merged, order.shape[1] - budget + merged], 1)
        )
        similar = normalize(take(keys.mean(2)[:, 1:], rest), dim=-1)
        targets = torch.arange(merged, device=rest.device) * (rest.shape[1] // merged)
        nearest = (similar @ similar[:, targets].mT).argmax(-1)
        shares = one_hot(nearest, merged).to(features.dtype)  # (images, rest, merged)
        averages = shares.mT @ take(features, rest) / shares.sum(1).clamp(min=1)[..., None]
        return torch.cat([take(features, dominant), averages], dim=1)


def take(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows (images, indices, width) of features (images, patches, width)."""
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))


if __name__ == "__main__":
    main()
