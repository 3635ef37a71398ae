"""How the projector's cost grows with batch, image size, visual tokens and levels: fitted exponents of time and operations.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --device cuda --dtype bfloat16

An exponent of 1 means that twice as much costs twice as much. One quantity changes at a time, from a batch of 1, a grid of
24 x 24 patches, scale factor 2 and four levels.
"""

import math
from functools import partial
from typing import Any

import torch

from benchmarks.harness import arguments_of, prepare, print_table, products_alone, side_by_side, write_results
from benchmarks.projectors import ReleasedProjector
from benchmarks.shapes import model_config
from transformers_delta_llava.modeling import PROJECTORS


SWEEPS: dict[str, list[dict[str, int]]] = {
    "batch": [{"batch": n} for n in (1, 2, 4, 8)],
    "patches": [{"grid": n} for n in (12, 16, 24, 32)],
    "visual tokens": [{"scale_factor": n} for n in (12, 6, 4, 3, 2)],
    "levels": [{"levels": n} for n in (1, 2, 4, 8)],
}


def main() -> None:
    """Measure every sweep, fit, print, write."""
    parser = arguments_of("Fit how the projector's cost grows.", seconds=3.0)
    parser.add_argument("--shape", default="7b", help="0.5b, 7b, 13b, or tiny to try the script")
    arguments = parser.parse_args()
    prepare(arguments)
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for quantity, sweep in SWEEPS.items():
        measured = [measure(quantity, arguments, **setting) for setting in sweep]
        points += measured
        x = [point["size"] for point in measured]
        names = ("ours", "released", "operations")
        rows.append({"cost over": quantity} | {n: exponent(x, [point[n] for point in measured]) for n in names})
    print_table("Fitted exponents", rows)
    write_results("scaling", arguments, exponents=rows, points=points)


@torch.no_grad()
def measure(
    quantity: str, arguments: Any, batch: int = 1, grid: int = 24, scale_factor: int = 2, levels: int = 4
) -> dict[str, Any]:
    """Seconds and operations of one setting."""
    base = model_config(arguments.shape)
    config = model_config(
        arguments.shape,
        vision={**base.vision_config.to_dict(), "image_size": grid * base.vision_config.patch_size},
        vision_feature_levels=[base.vision_feature_levels[-1]] * levels,
        scale_factor=scale_factor,
    )
    ours = PROJECTORS[config.projector_layout](config).to(arguments.device, getattr(torch, arguments.dtype)).eval()
    features = torch.randn(batch, grid**2, config.vision_config.hidden_size).to(ours.value.weight)
    functions = {
        name: partial(module, features, [features] * levels, scale_factor)
        for name, module in (("released", ReleasedProjector(ours).eval()), ("ours", ours))
    }
    seconds = side_by_side(functions, arguments)
    size = {"batch": batch, "patches": grid**2, "visual tokens": (grid // scale_factor) ** 2, "levels": levels}
    return {
        "quantity": quantity,
        "size": size[quantity],
        **seconds,
        "operations": products_alone(functions["ours"])[1],
    }


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of log y over log x by least squares."""
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v)) / sum((a - mean_u) ** 2 for a in u)


if __name__ == "__main__":
    main()
