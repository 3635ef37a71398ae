"""The projector's time and memory compared with the released computation, a TokenPacker-style projector and LLaVA's MLP.

    python -m benchmarks.projector
    python -m benchmarks.projector --device cuda --dtype bfloat16 --compile

Of CLIP-L/336 and a language model 4096 wide, at every scale factor. `released` is the released computation step by step on the
same parameters (`projectors/released.py`, which meets the oracle of the tests). The share of the machine's peak takes a product of
two square matrices, in the same turns, for the peak, and counts the exact FLOPs of what ours computes; the share of the products is
the time of ours against the time of its matrix products only.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.harness import (
    arguments_of,
    matmul,
    peak_bytes,
    prepare,
    print_table,
    products_alone,
    side_by_side,
    write_results,
)
from benchmarks.projectors import MLPProjector, ReleasedProjector, TokenPackerStyleProjector
from benchmarks.shapes import model_config
from transformers_delta_llava.modeling import PROJECTORS


def main() -> None:
    """Measure every scale factor and batch, print, write."""
    parser = arguments_of("Time the projector and others.")
    parser.add_argument("--shape", default="7b", help="0.5b, 7b, 13b, or tiny to try the script")
    parser.add_argument("--scale-factors", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 24])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--compile", action="store_true", help="compile every projector")
    arguments = parser.parse_args()
    prepare(arguments)
    projectors = build(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    if arguments.compile:
        projectors = {name: torch.compile(module, fullgraph=name == "ours") for name, module in projectors.items()}
    inference, training = [], []
    for batch in arguments.batch_sizes:
        for scale_factor in arguments.scale_factors:
            inference.append(forward(projectors, batch, scale_factor, arguments))
            training.append(forward_backward(projectors, batch, scale_factor, arguments))
    print_table("Forward, milliseconds", inference)
    print_table("Forward and backward, milliseconds", training)
    write_results("projector", arguments, inference=inference, training=training)


def build(shape: str, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Four projectors of random weights, in evaluation mode; `released` and `ours` share theirs."""
    config = model_config(shape)
    ours = PROJECTORS[config.projector_layout](config)
    projectors: dict[str, nn.Module] = {
        "released": ReleasedProjector(ours),
        "ours": ours,
        "token packer": TokenPackerStyleProjector(config),
        "mlp": MLPProjector(config),
    }
    return {name: module.to(device, dtype).eval() for name, module in projectors.items()}


def inputs(projectors: dict[str, nn.Module], batch: int) -> list[torch.Tensor]:
    """As many levels as the config has; the last one makes the queries."""
    ours = getattr(projectors["ours"], "_orig_mod", projectors["ours"])
    weight, config = ours.value.weight, ours.config
    shape = (batch, config.grid_size**2, config.vision_config.hidden_size)
    return [torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in config.vision_feature_levels]


@torch.no_grad()
def forward(projectors: dict[str, nn.Module], batch: int, scale_factor: int, arguments: Any) -> dict[str, Any]:
    """Times, ratios, shares of the machine's limit, peak memory and error at inference."""
    levels = inputs(projectors, batch)
    functions = {name: partial(module, levels[-1], levels, scale_factor) for name, module in projectors.items()}
    expected, output = functions["released"](), functions["ours"]()
    error = ((output - expected).abs().max() / expected.abs().max()).item()
    peak, peak_flops = matmul(arguments.device, levels[0].dtype)
    products, flops = products_alone(functions["ours"]) if not arguments.compile else (peak, peak_flops)
    seconds = side_by_side({**functions, "peak": peak, "products": products}, arguments)
    released, ours = (peak_bytes(functions[name], arguments.device) for name in ("released", "ours"))
    return {
        "batch": batch,
        "s": scale_factor,
        **{name: 1000 * seconds[name] for name in projectors},
        "released/ours": seconds["released"] / seconds["ours"],
        "share of peak": flops / seconds["ours"] / (peak_flops / seconds["peak"]),
        "share of products": seconds["products"] / seconds["ours"],
        "MB released": released / 1e6,
        "MB ours": ours / 1e6,
        "memory ratio": ours / released,
        "error": error,
    }


def forward_backward(
    projectors: dict[str, nn.Module], batch: int, scale_factor: int, arguments: Any
) -> dict[str, Any]:
    """Times and ratio in training, without stochastic depth: levels have no gradient, as with a frozen tower."""
    levels = inputs(projectors, batch)

    def step(module: nn.Module) -> None:
        module.zero_grad()
        module(levels[-1], levels, scale_factor).sum().backward()

    functions = {name: partial(step, module) for name, module in projectors.items()}
    seconds = side_by_side(functions, arguments)
    return {
        "batch": batch,
        "s": scale_factor,
        **{name: 1000 * seconds[name] for name in projectors},
        "released/ours": seconds["released"] / seconds["ours"],
    }


if __name__ == "__main__":
    main()
