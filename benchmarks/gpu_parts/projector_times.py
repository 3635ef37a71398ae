"""The projector alone, beside the released computation, a TokenPacker-style projector and LLaVA's MLP.

`eager` as everybody calls it; `graph`: captured, so that Python does not count (the released computation looks at its scores in
between and cannot be captured); `compiled` by Inductor. The floor is operations over the rate of a large product, or weights, inputs
and outputs over the bandwidth of a large copy, whichever takes longer.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from harness import peak_bytes
from projector import build, inputs
from transformers_delta_llava.analysis.profile import projector_costs
from transformers_delta_llava.modeling.delta_repo_delta_llava import dtype_name

from .report import Report, captured, measured_rates, milliseconds


SCALE_FACTORS = [2, 1, 6, 24, 3, 4, 8, 12]
# Compiling takes seconds for each, so the most telling first, until the time is up: batch and scale factor.
COMPILED = [(1, 2), (32, 2), (1, 6), (32, 6), (1, 1), (32, 1), (1, 24), (32, 24), (256, 2), (1, 3), (1, 4)]


@torch.no_grad()
def projector(report: Report) -> None:
    """bfloat16, then float16; every batch, every scale factor."""
    batches = [1, 2] if report.rehearse else [1, 32, 256]
    for dtype in (torch.bfloat16, torch.float16):
        name = dtype_name(dtype)
        projectors = build("tiny" if report.rehearse else "7b", report.device, dtype)
        rates = measured_rates(report, dtype)
        report.note(**{f"rates, {name}": rates})
        for batch in batches:
            for scale_factor in SCALE_FACTORS[:2] if report.rehearse else SCALE_FACTORS:
                report.attempt(
                    f"{name}, batch {batch}, s {scale_factor}",
                    partial(_measure, report, projectors, rates, name, batch, scale_factor),
                    3.0,
                )
        if dtype == torch.bfloat16:
            for batch, scale_factor in COMPILED[:1] if report.rehearse else COMPILED:
                if report.left() > (0 if report.rehearse else 30):  # leaves time for float16
                    report.attempt(
                        f"compiled, batch {batch}, s {scale_factor}",
                        partial(_compiled, report, projectors, rates, batch, scale_factor),
                    )


def _measure(
    report: Report,
    projectors: dict[str, nn.Module],
    rates: dict[str, float],
    dtype: str,
    batch: int,
    scale_factor: int,
) -> None:
    levels = inputs(projectors, batch)
    calls = {name: partial(module, levels[-1], levels, scale_factor) for name, module in projectors.items()}
    expected, output = calls["released"](), calls["ours"]()
    error = ((output - expected).abs().max() / expected.abs().max()).item()
    del expected, output
    memory = {name: peak_bytes(calls[name], report.device) for name in ("released", "ours")}
    ways = {"eager": calls}
    if batch == 1:
        ways["graph"] = {n: captured(call, report.device) for n, call in calls.items() if n != "released"}
    for way, functions in ways.items():
        row = _row(report, projectors, rates, way, batch, scale_factor, functions)
        row |= {"memory ratio": memory["ours"] / max(1, memory["released"]), "error": error}
        report.add(dtype=dtype, **row)


def _compiled(
    report: Report, projectors: dict[str, nn.Module], rates: dict[str, float], batch: int, scale_factor: int
) -> None:
    torch.compiler.reset()  # each shape for itself, and no limit reached
    levels = inputs(projectors, batch)
    backend = "eager" if report.rehearse else "inductor"
    calls = {
        name: partial(
            torch.compile(projectors[name], fullgraph=name == "ours", dynamic=False, backend=backend),
            levels[-1],
            levels,
            scale_factor,
        )
        for name in ("ours", "released")
    }
    if batch == 1 and report.device == "cuda":
        calls["ours, graph"] = captured(calls["ours"], report.device)
    report.add(dtype="bfloat16", **_row(report, projectors, rates, "compiled", batch, scale_factor, calls), error=None)


def _row(
    report: Report,
    projectors: dict[str, nn.Module],
    rates: dict[str, float],
    way: str,
    batch: int,
    scale_factor: int,
    functions: dict[str, Any],
) -> dict[str, Any]:
    """Milliseconds of each, and how far ours is from the floor."""
    ours: Any = projectors["ours"]
    config = ours.config
    times = milliseconds(functions, report.device, 0.3)
    best = min(times.get(name, times["ours"]) for name in ("ours", "ours, graph"))
    patches, width = config.grid_size**2, config.vision_config.hidden_size
    numbers = sum(parameter.numel() for parameter in ours.parameters())
    if scale_factor > 1:  # at 1 only a part of the weights is read
        numbers += batch * patches * width * len(config.vision_feature_levels)
        numbers += batch * config.num_visual_tokens_for(scale_factor) * config.text_config.hidden_size
    else:
        numbers = batch * patches * (width * len(config.vision_feature_levels) + config.text_config.hidden_size)
    flops = batch * projector_costs(ours, scale_factor)[0]
    floor = 1000 * max(flops / rates["flops_per_second"], 2 * numbers / rates["bytes_per_second"])
    return {
        "way": way,
        "batch": batch,
        "s": scale_factor,
        **times,
        "released/ours": times["released"] / best if "released" in times else None,
        "share of peak": flops / (best / 1000) / rates["flops_per_second"],
        "floor, ms": floor,
        "times the floor": best / floor,
    }
