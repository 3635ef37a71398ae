"""One forward pass of the `paper` layout, what flowed through it, and the same chain by the equations."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tests.modeling import paper_equations as paper
from tests.modeling.projector_cases import drawn_inputs, projector, projector_config
from tests.reference.goldens import difference


TOLERANCE = 1e-10  # float64; the positions are the module's own, float32, and checked on their own


class Flow:
    """One forward pass and what went in and out of its submodules, by the symbols of the paper."""

    def __init__(self, fields: dict[str, Any], scale_factor: int = 2, attention: str = "sdpa"):
        self.config = projector_config(projector_layout="paper", attention=attention, **({"grid": 12} | fields))
        self.module = projector(self.config)
        self.p = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        self.z, *self.levels = drawn_inputs(self.config)
        self.side = self.config.grid_size // scale_factor
        seen: dict[str, Any] = {}

        def keep(module: nn.Module, source: str | None, result: str | None) -> RemovableHandle:
            """Records what first goes into and comes out of a module."""

            def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                for name, value in ((source, inputs if len(inputs) == 3 else inputs[0]), (result, output)):
                    if name:
                        seen.setdefault(name, value)

            return module.register_forward_hook(hook)

        hooks = [
            keep(self.module.refine, "interpolated", "refined"),
            keep(self.module.query, "q_hat", "q0"),
            keep(self.module.block, "block input", "q"),
            keep(self.module.window_attention, "memory", "y"),
            keep(self.module.out_proj, "t", None),
        ]
        with torch.no_grad():
            self.output = self.module(self.z, self.levels, scale_factor)
        for hook in hooks:
            hook.remove()
        query, *windows = seen["memory"]
        seen["memory"] = (query, *([on_the_grid(x) for x in w.chunk(len(self.levels), dim=2)] for w in windows))
        self.seen = seen

    @property
    def head_dim(self) -> int:
        return self.config.projector_head_dim

    def projected(self, role: str, x: Tensor, *level: int) -> Tensor:
        return paper.project(paper.below(self.p, {"q": "query", "k": "key", "v": "value"}[role]), x, *level)


def on_the_grid(windows: Tensor) -> Tensor:
    """(B, windows, patches of one, C) to (B, patches, C), patch by patch."""
    side, size = math.isqrt(windows.shape[1]), math.isqrt(windows.shape[2])
    grid = [
        windows[:, row // size * side + column // size, row % size * size + column % size]
        for row in range(side * size)
        for column in range(side * size)
    ]
    return torch.stack(grid, dim=1)


def whole(flow: Flow, use_emhsa: bool = True, use_block: bool = True) -> Tensor:
    """Equations (3) to (11) one after another, from the inputs only."""
    q = paper.refine(
        paper.below(flow.p, "refine"), paper.interpolated(flow.z, flow.side), flow.head_dim, use_emhsa=use_emhsa
    )
    q = flow.projected("q", q + flow.module.position(flow.side, torch.float64))
    if use_block:
        q = paper.cascade(paper.below(flow.p, "block"), q, flow.head_dim, use_emhsa=use_emhsa)
    keys, values = ([flow.projected(role, z, i) for i, z in enumerate(flow.levels)] for role in "kv")
    heads = flow.config.projector_num_attention_heads or 1
    y = paper.window_attention(q, keys, values, heads)
    return paper.linear(flow.p, "out_proj", paper.feed_forward(flow.p, y))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert difference(actual, expected) <= TOLERANCE
