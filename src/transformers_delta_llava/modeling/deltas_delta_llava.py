# Copyright 2026 The transformers-delta-llava authors.
# SPDX-License-Identifier: Apache-2.0
"""DeltaProjection, a base matrix plus low-rank updates, and the sets of updates that users save, load, swap and merge.

Shapes: r is the rank of a set. The factors of one update are `delta_u` (in, r) and `delta_v` (r, out); a base that several
levels share has one update per level, stacked along a leading axis.

On disk a set is one file, `deltas.safetensors`: the factors of every DeltaProjection, named as in the projector
(`query.delta_u`), and in its metadata what they fit (`projector_layout`, `base_sha256`).
"""

import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import cached_file


DELTA_WEIGHTS = "deltas.safetensors"
FACTORS = ("delta_u", "delta_v")
Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]

CARD = """---
library_name: transformers
{base_model}tags:
- delta-llava
- delta-llava-deltas
---

# {title}

Low-rank deltas of a [Delta-LLaVA](https://arxiv.org/abs/2512.18910) projector. They fit one base; every other base is
refused.

```python
model.load_deltas("{title}")
```
"""


class DeltaProjection(nn.Module):
    """A base matrix plus low-rank updates: `x @ (weight + (delta_u @ delta_v).T).T`, equation (4).

    The product `delta_u @ delta_v` is not formed: `x @ delta_u @ delta_v` costs less at these ranks.

    Parameters: `weight` (out, in), `delta_u` (in, r) and `delta_v` (r, out), stacked to (levels, in, r) and (levels, r, out)
    where levels share the base. The factors are `None` at rank 0 (the ablation "No DeltaProj").

    The active set of deltas is in the parameters. Other sets, and sums of base and deltas ("merged"), are held next to them,
    outside the state dict; see [`DeltaMixin`].

    Args:
        in_features, out_features: of the base.
        rank: of the first set of deltas, which is called "default".
        levels: how many updates the base has; `None` for one that is not stacked.
        sum_levels: apply the sum of all updates, and not one of them.
        hidden_act: activation that follows the map, and a LayerNorm after it, as in the released code; the paper has neither.
    """

    delta_u: nn.Parameter | None
    delta_v: nn.Parameter | None
    merged_weights: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        levels: int | None = None,
        sum_levels: bool = False,
        hidden_act: str | None = None,
    ):
        super().__init__()
        self.stack = () if levels is None else (levels,)
        self.num_updates = 1 if levels is None or sum_levels else levels
        # Raw parameters, not nn.Linear: engines and quantisers replace every nn.Linear.
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        for name, shape in zip(FACTORS, self.factor_shapes(rank)):
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if rank else None)
        self.act = ACT2FN[hidden_act] if hidden_act else nn.Identity()
        self.norm = nn.LayerNorm(out_features, eps=1e-6) if hidden_act else nn.Identity()
        self.active_deltas = "default"
        self.held_deltas: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}  # the other sets
        self.times_disabled = 0
        self.register_buffer("merged_weights", None, persistent=False)
        self.register_load_state_dict_pre_hook(_unmerge)
        self.reset_parameters()

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `delta_u` and `delta_v` at this rank."""
        out_features, in_features = self.weight.shape
        return (*self.stack, in_features, rank), (*self.stack, rank, out_features)

    def reset_parameters(self) -> None:
        """Truncated normal base, Xavier-uniform factors, as in the released code: the update does not start at 0."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        for factor in (self.delta_u, self.delta_v):
            if factor is not None:
                init_factor(factor)

    def forward(self, hidden_states: torch.Tensor, level: int = 0) -> torch.Tensor:
        """(..., in) to (..., out), by the base and the update of `level`."""
        weight, factors = self.operands(level)
        projected = F.linear(hidden_states, weight)
        if factors is not None:
            projected = projected + hidden_states @ factors[0] @ factors[1]
        return self.norm(self.act(projected))

    def operands(self, level: int = 0) -> tuple[torch.Tensor, Factors | None]:
        """What the input is multiplied with: the base and the factors of `level`, or only their merged sum."""
        if self.delta_u is None or self.times_disabled:
            return self.weight, None
        if self.merged_weights is not None:
            return self.merged_weights[level], None
        return self.weight, self.factors(level)

    def factors(self, level: int = 0) -> Factors:
        """(in, r) and (r, out) of one update; (in, levels * r) and (levels * r, out) of the sum of all."""
        assert self.delta_u is not None and self.delta_v is not None
        if not self.stack:
            return self.delta_u, self.delta_v
        if self.num_updates == 1:
            return self.delta_u.transpose(0, 1).flatten(1), self.delta_v.flatten(0, 1)
        return self.delta_u[level], self.delta_v[level]

    def summed_weight(self, level: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(out, in), base and update added up in `dtype`."""
        if self.delta_u is None:
            return self.weight.to(dtype)
        delta_u, delta_v = self.factors(level)
        return self.weight.to(dtype) + (delta_u.to(dtype) @ delta_v.to(dtype)).T

    def hold(self, name: str, factors: Factors) -> None:
        """Keep a set next to the active one."""
        delta_u, delta_v = (nn.Parameter(factor.detach()) for factor in factors)
        self.held_deltas[name] = (delta_u, delta_v)

    def activate(self, name: str) -> None:
        """Let a held set take the place of the active one: its device, dtype and `requires_grad`, not its rank."""
        assert self.delta_u is not None and self.delta_v is not None
        active, held = (self.delta_u, self.delta_v), self.held_deltas.pop(name)
        for factor, old, new in zip(FACTORS, active, held):
            new.data = new.data.to(old)
            setattr(self, factor, new.requires_grad_(old.requires_grad))
        self.held_deltas[self.active_deltas], self.active_deltas = active, name

    def train(self, mode: bool = True) -> "DeltaProjection":
        """As in PyTorch. Merged sums would not follow what training does to the parameters, so they are dropped."""
        if mode and self.merged_weights is not None:
            warnings.warn("Merged deltas cannot be trained: they are unmerged.", stacklevel=2)
            self.merged_weights = None
        return super().train(mode)


def _unmerge(projection: DeltaProjection, *args: Any) -> None:
    """Before weights are loaded: the sums would not follow them."""
    projection.merged_weights = None


class MemoryProjection(DeltaProjection):
    """A DeltaProjection of all levels side by side. They may come one by one: then the products with each add up."""

    def forward(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        """Tensors (..., width), whose widths add up to in, to (..., out); more than one only without gradients."""
        if len(levels) == 1:
            return super().forward(levels[0])
        first, *others = (level.flatten(0, -2) for level in levels)
        widths = [level.shape[-1] for level in levels]
        base, factors = self.operands()
        first_weight, *weights = base.split(widths, dim=1)
        projected = F.linear(first, first_weight)
        dtype = projected.dtype  # chosen by autocast, which does not reach in-place operations
        for level, weight in zip(others, weights):
            projected.addmm_(level.to(dtype), weight.T.to(dtype))
        if factors is not None:
            first_u, *others_u = factors[0].split(widths)
            reduced = first @ first_u
            for level, delta_u in zip(others, others_u):
                reduced.addmm_(level.to(dtype), delta_u.to(dtype))
            projected = projected.addmm_(reduced, factors[1].to(dtype))
        return self.norm(self.act(projected)).unflatten(0, levels[0].shape[:-1])


def init_factor(factor: torch.Tensor) -> None:
    """Xavier-uniform, update by update."""
    bound = math.sqrt(6 / sum(factor.shape[-2:]))
    nn.init.uniform_(factor, -bound, bound)


class DeltaMixin:
    """The methods for deltas, of the base model and of the model with a head.

    A *set* is `delta_u` and `delta_v` of every DeltaProjection, all of one rank. One set is active: its tensors are the
    model's parameters, and `config.delta_rank` is its rank. The first set is called "default". Tensors are named as in the
    projector, `query.delta_u`.

    Every method raises `ValueError` if the model has no deltas (`use_delta_projection=False`). What raises changes nothing.
    """

    config: Any

    @property
    def active_deltas(self) -> str:
        """Name of the active set."""
        return self._any_projection().active_deltas

    @property
    def delta_names(self) -> list[str]:
        """Names of all sets, the active one first."""
        return [self.active_deltas, *self._any_projection().held_deltas]

    def delta_state_dict(self, name: str | None = None) -> dict[str, torch.Tensor]:
        """A set's tensors by name, the active set's by default. Like `state_dict()` it shares memory with the model."""
        if name is not None:
            self._known(name)
        state_dict: dict[str, torch.Tensor] = {}
        for prefix, projection in self._delta_projections().items():
            active = tuple(projection.get_parameter(factor) for factor in FACTORS)
            factors = projection.held_deltas.get(name or "", active)
            state_dict |= {f"{prefix}.{factor}": tensor.detach() for factor, tensor in zip(FACTORS, factors)}
        return state_dict

    def save_deltas(
        self, folder: str | os.PathLike, name: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write a set to `folder`: `deltas.safetensors`, replaced in one step if it exists, and a card if there is none.

        Args:
            folder: created if necessary.
            name: of the set; the active one by default.
            dtype: of the file; the model's by default.

        Raises:
            ValueError: there is no such set, or a value is not finite in `dtype`.
        """
        # A path of this machine is useless elsewhere, so only the name of a Hub repo is written.
        base = self.config.name_or_path
        base = base if getattr(self.config, "_commit_hash", None) and not Path(base).exists() else None
        tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in self.delta_state_dict(name).items()}
        write_deltas(folder, tensors, self.config.projector_layout, self._hash_base(), base)

    @torch.no_grad()
    def load_deltas(
        self,
        model_id: str | os.PathLike,
        name: str | None = None,
        force: bool = False,
        activate: bool = True,
        **hub_kwargs: Any,
    ) -> str:
        """Add a set that `save_deltas` wrote, and switch to it.

        Args:
            model_id: a folder, or a repo on the Hub.
            name: for the set; the last part of `model_id` by default.
            force: accept deltas of another base. A base is recognised by its values in bfloat16; where float16 has rounded
                them it counts as another one.
            activate: switch to it; otherwise it is held until `set_deltas`.
            hub_kwargs: `revision`, `token`, `subfolder`, `cache_dir`, ... as for `from_pretrained`.

        Returns:
            The name of the set.

        Raises:
            ValueError: the name is taken; the deltas belong to another layout or base; their names or shapes do not fit; or
                a value is not finite in the model's dtype.
            OSError: there is no such folder, repo or file.
        """
        name = name or Path(model_id).resolve().name
        tensors, metadata = read_deltas(model_id, **hub_kwargs)
        layout, base = metadata.get("projector_layout"), metadata.get("base_sha256")
        if layout != self.config.projector_layout:
            raise ValueError(
                f"{model_id}: projector_layout={layout!r}, the model's is {self.config.projector_layout!r}"
            )
        if not force and base != self._hash_base():
            raise ValueError(
                f"{model_id}: these deltas belong to another base ({metadata.get('base_model', 'not named')}); load that "
                "model, or pass force=True"
            )
        self._add_set(name, tensors, activate)
        return name

    @torch.no_grad()
    def add_deltas(self, name: str, rank: int | None = None, activate: bool = True) -> None:
        """Add a new set to train, and switch to it. It changes nothing yet: `delta_v` is zero, `delta_u` is drawn.

        Args:
            name: for the set.
            rank: of the set; the active one's by default.
            activate: switch to it; otherwise it is held until `set_deltas`.

        Raises:
            ValueError: the name is taken, or the rank is below 1.
        """
        rank = self.config.delta_rank if rank is None else rank
        tensors = {}
        for prefix, projection in self._delta_projections().items():
            shape_u, shape_v = projection.factor_shapes(rank)
            tensors[f"{prefix}.delta_u"] = projection.weight.new_empty(shape_u)
            tensors[f"{prefix}.delta_v"] = projection.weight.new_zeros(shape_v)
            init_factor(tensors[f"{prefix}.delta_u"])
        self._add_set(name, tensors, activate)

    def set_deltas(self, name: str) -> None:
        """Switch to another set, in the time of a few assignments. Merged deltas are unmerged, with a warning.

        The parameters of the set take the place of the active ones, so an optimizer goes on with the set it was made for,
        and a compiled graph is compiled again only for another rank. Switch before DDP or FSDP wraps the model.

        Raises:
            ValueError: there is no such set, or the projector is offloaded.
        """
        if self._known(name) == self.active_deltas:
            return
        projections = self._delta_projections(in_memory=True)
        self._unmerge_with_warning()
        for projection in projections.values():
            projection.activate(name)
        self.config.delta_rank = next(self._active_factors()).shape[-1]

    @contextmanager
    def disable_deltas(self) -> Iterator[None]:
        """Within a `with` block, compute with the bases only, merged or not. For all threads; blocks may overlap."""
        projections = self._delta_projections().values()
        try:
            for projection in projections:
                projection.times_disabled += 1
            yield
        finally:
            for projection in projections:
                projection.times_disabled -= 1

    @torch.no_grad()
    def merge_deltas(self) -> None:
        """Add base and deltas in float32 ahead of time, so that the forward pass does one product instead of three.

        The sums are kept next to the parameters, in their dtype, outside the state dict. This costs the memory of the base
        matrices once more (19 MB at 7B in bfloat16; where levels share a base, once per level); a saved model cannot apply
        its deltas twice, and `unmerge_deltas` restores the exact bits. Merged deltas get no gradient: `train()`,
        `set_deltas` and loading a state dict unmerge. `delta-llava delta merge` writes a repo with merged bases.

        Raises:
            ValueError: a sum is not finite, or the projector is offloaded.
        """
        projections = self._delta_projections(in_memory=True)
        if self._is_merged():
            warnings.warn("The deltas are merged already, nothing to do.", stacklevel=2)
            return
        merged = {}
        for name, projection in projections.items():
            sums = [projection.summed_weight(level) for level in range(projection.num_updates)]
            merged[name] = torch.stack(sums).to(projection.weight.dtype)
            if not torch.isfinite(merged[name]).all():
                raise ValueError(f"{name}: base and deltas add up to NaN or Inf")
        for name, projection in projections.items():
            projection.merged_weights = merged[name]

    def unmerge_deltas(self) -> None:
        """Undo `merge_deltas` exactly. Warns where nothing is merged."""
        if not self._is_merged():
            warnings.warn("No deltas are merged, nothing to do.", stacklevel=2)
        for projection in self._delta_projections().values():
            projection.merged_weights = None

    def set_deltas_trainable(self, freeze_others: bool = True) -> None:
        """Give gradients to the active deltas, and by default to nothing else. Merged deltas are unmerged, with a warning.

        The forward and backward pass are low-rank then: no product of the factors, no gradient of a base. Small steps vanish
        in bfloat16: load the model in float32, or make the deltas float32 and run under autocast, as recipes do.

        Args:
            freeze_others: take gradients off every other parameter. `False` leaves them as they are, such as PEFT's adapters.
                PEFT freezes the deltas when it wraps a model, so call this afterwards.
        """
        deltas = list(self._active_factors())
        self._unmerge_with_warning()
        if freeze_others:
            self.requires_grad_(False)  # type: ignore[attr-defined]
        for parameter in deltas:
            parameter.requires_grad_(True)

    def _delta_projections(self, in_memory: bool = False) -> dict[str, DeltaProjection]:
        if not self.config.use_delta_projection:
            raise ValueError("use_delta_projection=False: this model has no deltas")
        # Through the attribute: where PEFT trains a copy of the projector, its wrapper returns the copy's.
        projections = self.base_model.multi_modal_projector.delta_projections()  # type: ignore[attr-defined]
        if in_memory and any(projection.weight.is_meta for projection in projections.values()):
            raise ValueError("the projector is offloaded; give model.multi_modal_projector a device in device_map")
        return projections

    def _any_projection(self) -> DeltaProjection:
        return next(iter(self._delta_projections().values()))

    def _active_factors(self) -> Iterator[nn.Parameter]:
        for projection in self._delta_projections().values():
            yield from (projection.get_parameter(factor) for factor in FACTORS)

    def _hash_base(self) -> str:
        return hash_base({name: projection.weight for name, projection in self._delta_projections(True).items()})

    def _known(self, name: str) -> str:
        if name not in self.delta_names:
            raise ValueError(f"there are no deltas named {name!r}, only {', '.join(self.delta_names)}")
        return name

    def _add_set(self, name: str, tensors: Mapping[str, torch.Tensor], activate: bool) -> None:
        """Hold a set, in the dtype and on the device of the model, if it fits."""
        projections = self._delta_projections(in_memory=True)
        if name in self.delta_names:
            raise ValueError(f"there are deltas named {name!r} already; pass another name")
        names = [f"{prefix}.{factor}" for prefix in projections for factor in FACTORS]
        if tensors.keys() != set(names):
            raise ValueError(f"{name}: expected {', '.join(names)}, found {', '.join(sorted(tensors))}")
        rank, factors = tensors[names[0]].shape[-1], {}
        for prefix, projection in projections.items():
            pair = []
            for factor, shape in zip(FACTORS, projection.factor_shapes(rank)):
                tensor = tensors[f"{prefix}.{factor}"].to(projection.get_parameter(factor))
                if tensor.shape != shape or not rank:
                    raise ValueError(
                        f"{name}: {prefix}.{factor} is {tuple(tensor.shape)}, expected {shape}, rank at least 1"
                    )
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{name}: {prefix}.{factor} contains NaN or Inf")
                pair.append(tensor)
            factors[prefix] = (pair[0], pair[1])
        for prefix, projection in projections.items():
            projection.hold(name, factors[prefix])
        if activate:
            self.set_deltas(name)

    def _is_merged(self) -> bool:
        return self._any_projection().merged_weights is not None

    def _unmerge_with_warning(self) -> None:
        if self._is_merged():
            warnings.warn("The deltas were merged; they are unmerged for this.", stacklevel=3)
            self.unmerge_deltas()


def hash_base(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of base weights, the same for float32 and bfloat16 copies of a base.

    For each name, sorted: the line `name (out, in)` and the values in bfloat16, row by row, little-endian.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        values = weight.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_deltas(
    folder: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    projector_layout: str,
    base_sha256: str,
    base_model: str | None = None,
) -> None:
    """Write a set of deltas; see `DeltaMixin.save_deltas`.

    Args:
        folder: created if necessary.
        tensors: by name.
        projector_layout, base_sha256: what they fit, see `hash_base`.
        base_model: Hub id of the base, for the card.

    Raises:
        ValueError: a value is not finite.
    """
    folder = Path(folder).resolve()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} contains NaN or Inf")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "projector_layout": projector_layout, "base_sha256": base_sha256}
    metadata |= {"base_model": base_model} if base_model else {}
    temporary = folder / f".{DELTA_WEIGHTS}.tmp"
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    temporary.chmod(mode)  # some versions of safetensors let only the owner read
    temporary.replace(folder / DELTA_WEIGHTS)
    card = folder / "README.md"
    if not card.exists():
        base = f"base_model: {base_model}\nbase_model_relation: adapter\n" if base_model else ""
        card.write_text(CARD.format(base_model=base, title=folder.name), encoding="utf-8")


def read_deltas(
    folder_or_repo: str | os.PathLike, **hub_kwargs: Any
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a set by name, in the file's dtype, and the file's metadata.

    Raises:
        OSError: there is no such folder, repo or file.
    """
    path = cached_file(str(folder_or_repo), DELTA_WEIGHTS, **hub_kwargs)
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
