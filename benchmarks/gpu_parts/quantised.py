"""Prefill and decoding with weights of 8 and 4 bits, by what PyTorch brings along, where it has the kernels for the device.

Only the linear maps of the language model's layers are quantised, as every quantiser of transformers does with this model. Each map is
compared with its own weights put back to bfloat16 before anything is timed.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from harness.models import LLAVA, build_pair

from .answers import LONG, SHORT, floors, graphed, llava_profile, make_side, our_profiles, row_name, shape_of
from .report import Report, measured_rates, peak_gigabytes


GROUP = 64  # input channels that share a scale, at 4 bits


class Int8Linear(nn.Module):
    """Weights of 8 bits, one scale for each output channel."""

    operation = "aten::_weight_int8pack_mm"

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        self.register_buffer("quantised", (weight / scale).round().to(torch.int8))
        self.register_buffer("scales", scale.flatten().to(linear.weight.dtype))

    def dense(self) -> torch.Tensor:
        """The weights that the map stands for, (out, in)."""
        return self.quantised * self.scales[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        product = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.quantised, self.scales)
        return product.unflatten(0, x.shape[:-1])


class Int4Linear(nn.Module):
    """Weights of 4 bits, a scale and a zero for each group of input channels."""

    operation = "aten::_weight_int4pack_mm"

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float().unflatten(1, (-1, GROUP))
        low, high = weight.amin(2, keepdim=True), weight.amax(2, keepdim=True)
        scale = (high - low).clamp(min=1e-6) / 15
        levels = ((weight - low) / scale).round().clamp(0, 15).to(torch.int32)
        both = torch.cat([scale, low + 8 * scale], 2).to(linear.weight.dtype)  # (out, groups, 2)
        self.register_buffer("scales_and_zeros", both.transpose(0, 1).contiguous())
        dense = (levels - 8) * both[..., :1] + both[..., 1:]
        self.kept: torch.Tensor | None = dense.flatten(1).to(linear.weight.dtype)
        levels = levels.flatten(1)
        if levels.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack(
                (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8), 8
            )
        self.register_buffer("packed", packed)

    def dense(self) -> torch.Tensor:
        """The weights that the map stands for, (out, in); once, as they are let go then."""
        dense, self.kept = self.kept, None
        assert dense is not None
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        rows = x.flatten(0, -2)
        if rows.device.type == "cpu":
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales_and_zeros)
        else:
            product = torch.ops.aten._weight_int4pack_mm(rows, self.packed, GROUP, self.scales_and_zeros)
        return product.unflatten(0, x.shape[:-1])


@torch.no_grad()
def quantised(report: Report) -> None:
    """7B at batch 1 in captured graphs: bfloat16, 8 bits, 4 bits."""
    rates = measured_rates(report)
    report.note(rates=rates)
    reference: dict[Any, dict[str, Any]] = {}
    kinds: dict[str, Any] = {"bfloat16": None, "int8": Int8Linear, "int4": Int4Linear}
    for kind, linear in kinds.items():
        if linear is not None and not _has_kernel(linear.operation, report.device):
            report.note(left_out=[*report.content["left_out"], f"{kind}: PyTorch has no {linear.operation} here"])
            continue
        report.attempt(kind, partial(_measure, report, kind, linear, rates, reference), 8.0)


def _has_kernel(operation: str, device: str) -> bool:
    if device == "cpu":  # packed otherwise there, by an operation of its own
        operation = operation.replace("int4pack_mm", "int4pack_mm_for_cpu")
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation, {"cpu": "CPU", "cuda": "CUDA"}[device])


def _measure(report: Report, kind: str, linear: Any, rates: dict[str, float], reference: dict[Any, Any]) -> None:
    ours, llava = pair = build_pair(shape_of(report, "7b"), report.device, torch.bfloat16)
    if linear is not None:
        replace_linears(ours.model.language_model.layers, linear)
    language_model = ours.model.language_model
    stored = [*language_model.parameters(), *language_model.buffers(), *ours.lm_head.parameters()]
    embedding = language_model.get_input_embeddings().weight
    read = sum(tensor.nbytes for tensor in stored if tensor is not embedding)
    profiles = {LLAVA: llava_profile(ours, LONG), 144: our_profiles(ours.config, [144])[0]}
    for name in (144, LLAVA):
        peak_gigabytes(report)
        row = row_name(name) | {"weights": kind, "batch": 1, "GB of weights": read / 1e9}
        row |= graphed(report, make_side(pair, name, 1), "quantised")
        profile = profiles[name]
        weights = profile.budgets[0].weight_bytes | {"prefill": read, "decode": read}
        profile = replace(profile, budgets=[replace(profile.budgets[0], weight_bytes=weights)])
        row |= {key: value for key, value in floors(row, profile, rates).items() if "per token" in key}
        before = reference.setdefault(name, row)
        for what in ("first token, ms", f"tokens/s, {SHORT}"):
            row[f"{what}, of bfloat16's"] = row[what] / before[what]
        report.add(**row)


def replace_linears(layers: nn.Module, linear: Any) -> None:
    """Put quantised maps in place of all linear maps, the first of each shape after a comparison with its dense weights.

    Raises:
        ValueError: if a map computes something else.
    """
    compared: set[tuple[int, ...]] = set()
    for module in list(layers.modules()):
        for name, part in list(module.named_children()):
            if not isinstance(part, nn.Linear):
                continue
            packed = linear(part)
            dense, shape = packed.dense(), tuple(part.weight.shape)
            if shape not in compared:
                x = torch.randn(3, shape[1], device=dense.device, dtype=dense.dtype)
                expected = x.float() @ dense.float().T
                error = ((packed(x).float() - expected).norm() / expected.norm()).item()
                if not error < 2e-2:
                    raise ValueError(
                        f"{linear.operation} is off by {error:.2g} for {shape}: its packing is another one here."
                    )
                compared.add(shape)
            setattr(module, name, packed)
