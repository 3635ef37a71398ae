"""Low-rank deltas as things users hold: named sets on one base that can be saved, loaded, swapped and merged.

What has a name: a *set* is the `delta_u` and `delta_v` of every DeltaProjection. One set is active, which is to say in
the parameters; it is called "default" at first. The others are held beside them, outside the state dict.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .delta_factors_delta_llava import (
    FACTORS,
    applied_updates,
    check_deltas,
    factors_of,
    fill,
    hooks,
    resident,
    shapes_at,
    trimmed,
)
from .delta_repo_delta_llava import (
    describe_deltas,
    hashes_of_base,
    is_base,
    read_delta_config,
    read_delta_tensors,
    write_delta_repo,
)
from .projector_delta_llava import DeltaProjection, delta_weight


class DeltaMixin:
    """The verbs for deltas, on the base model and on the model with a head alike.

    All of them check everything before they change anything: after an error the model is as it was. Tensors are named
    as in the projector, `q_proj.delta_u`. Swapping writes into the parameters that are there, so optimizers, compiled
    graphs and other references to them stay valid.

    Sets may differ in rank. The parameters have rank `config.delta_rank`; a set of lower rank fills its part of them,
    and zeros the rest, which get no gradient and stay zero. A set of higher rank needs `resize_deltas` first.
    """

    config: Any

    def delta_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the active deltas, `delta_u` and `delta_v` of each projection: what an optimizer wants.

        Raises:
            ValueError: if the model has no deltas (`use_delta_projection=False`), as every method here.
        """
        for projection in self._delta_projections().values():
            yield from (getattr(projection, factor) for factor in FACTORS)

    @property
    def delta_names(self) -> list[str]:
        """Names of all sets, the active one first."""
        projection = next(iter(self._delta_projections().values()))
        return [projection.active_deltas, *projection.held_deltas]

    @property
    def active_deltas(self) -> str:
        """Name of the active set."""
        return self.delta_names[0]

    def delta_state_dict(self, name: str | None = None) -> dict[str, torch.Tensor]:
        """A set's tensors by name, at its own rank, detached; like `state_dict()` it shares memory with the model.

        Args:
            name: of the set; the active one by default.

        Raises:
            ValueError: if there is no such set.
        """
        name = self._check_name(name)
        found: dict[str, torch.Tensor] = {}
        for prefix, projection in self._delta_projections().items():
            if name == projection.active_deltas:
                factors = trimmed(*factors_of(projection), projection.active_rank)
            else:
                factors = projection.held_deltas[name]
            found |= {f"{prefix}.{factor}": tensor.detach() for factor, tensor in zip(FACTORS, factors)}
        return found

    @torch.no_grad()
    def load_delta_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Overwrite the active set.

        Args:
            state_dict: as `delta_state_dict` gives it, of any float dtype and device, of any rank that fits. Names may
                have what leads to the projector before them (`model.multi_modal_projector.q_proj.delta_u`).

        Raises:
            ValueError: on tensors that are missing, too many, misshapen, or not finite in the model's dtype, or while
                the deltas are merged.
        """
        projections = self._delta_projections()
        if self._is_merged():
            raise ValueError("The deltas are merged; call unmerge_deltas() before you overwrite them.")
        tensors, rank = self._fit(state_dict)
        targets = {prefix: factors_of(projection, write=True) for prefix, projection in projections.items()}
        for name, projection in projections.items():
            fill(targets[name], tensors[name])
            projection.active_rank = rank

    def save_deltas(
        self,
        folder: str | os.PathLike,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a set as a delta repo: `deltas.safetensors`, `delta_config.json`, `README.md`. Push it as any folder.

        Works while merged, too: the base is what it was.

        Args:
            folder: appears when it is whole; it must not exist, or be empty.
            name: of the set; the active one by default.
            dtype: of the file; the model's by default.
            overwrite: replace a delta repo that is there.

        Raises:
            ValueError: if there is no such set, or a value is not finite (in `dtype`).
            FileExistsError: if the folder exists and may not be replaced.
        """
        name = self._check_name(name)
        tensors = {n: t if dtype is None else t.to(dtype) for n, t in self.delta_state_dict(name).items()}
        config = describe_deltas(
            tensors,
            rank=next(iter(tensors.values())).shape[-1],
            layout=self.config.projector_layout,
            sharing=self.config.delta_sharing,
            base_sha256=hashes_of_base(self._base_weights()),
            base_name=getattr(self.config, "name_or_path", None),
            source=f"the deltas {name!r} of a model",
        )
        write_delta_repo(folder, tensors, config, overwrite)

    @torch.no_grad()
    def load_deltas(
        self,
        folder_or_repo: str | os.PathLike,
        name: str | None = None,
        force: bool = False,
        activate: bool = True,
        **hub_kwargs: Any,
    ) -> str:
        """Add a delta repo as a set of its own, and switch to it.

        Reads the repo alone; the base is hashed in memory, once.

        Args:
            folder_or_repo: a folder, or a repo on the Hub.
            name: for the set; the last part of `folder_or_repo` by default.
            force: take it although it belongs to another base. Whatever does not fit in shape is refused still.
            activate: switch to it; otherwise it is held until `set_deltas`.
            hub_kwargs: `revision`, `token`, `subfolder`, `cache_dir`, ... as for `from_pretrained`.

        Returns:
            The name of the set.

        Raises:
            ValueError: if the name is taken, or on another layout, base, rank or shape, on tensors that are missing
                or too many, or on values that are not finite in the model's dtype.
            OSError: if the repo cannot be read.
        """
        projections = self._delta_projections()
        name = name or Path(str(folder_or_repo)).name or Path(folder_or_repo).resolve().name
        if name in self.delta_names:
            raise ValueError(
                f"There are deltas named {name!r} already; pass another name, or delete_deltas({name!r})."
            )
        config = read_delta_config(folder_or_repo, **hub_kwargs)
        for field in ("projector_layout", "delta_sharing"):
            if config.get(field) != getattr(self.config, field):
                raise ValueError(
                    f"{folder_or_repo}: {field}={config.get(field)!r} of these deltas is not the model's, "
                    f"{getattr(self.config, field)!r}."
                )
        tensors, rank = self._fit(read_delta_tensors(folder_or_repo, **hub_kwargs), f"{folder_or_repo}: ")
        if rank != config["delta_rank"]:
            raise ValueError(
                f"{folder_or_repo}: delta_rank={config['delta_rank']!r} in its config, but its tensors have rank {rank}."
            )
        if not force and not is_base(self._base_weights(), config["base_sha256"]):
            raise ValueError(
                f"{folder_or_repo}: these deltas belong to another base "
                f"({config.get('base_model_name_or_path') or 'unnamed'}) than this model's "
                f"({getattr(self.config, 'name_or_path', None) or 'unnamed'}); load that one, or pass force=True."
            )
        targets = {prefix: factors_of(projection, write=activate) for prefix, projection in projections.items()}
        for prefix, projection in projections.items():
            delta_u, delta_v = (tensor.to(targets[prefix][0].device) for tensor in tensors[prefix])
            projection.held_deltas[name] = (delta_u, delta_v)
        if activate:
            self.set_deltas(name)
        return name

    @torch.no_grad()
    def set_deltas(self, name: str) -> None:
        """Switch to another set, in time and memory of the deltas alone; no base parameter is read or written.

        Merged deltas are unmerged, with a warning, unless they are those that are asked for. An optimizer's moments stay
        with the parameters, not with the set.

        Raises:
            ValueError: if there is no such set.
        """
        if self._check_name(name) == self.active_deltas:
            return
        projections = self._delta_projections()
        targets = {prefix: factors_of(projection, write=True) for prefix, projection in projections.items()}
        self._unmerge_with_warning()
        for prefix, projection in projections.items():
            delta_u, delta_v = trimmed(*targets[prefix], projection.active_rank)
            projection.held_deltas[projection.active_deltas] = (delta_u.detach().clone(), delta_v.detach().clone())
            factors = projection.held_deltas.pop(name)
            fill(targets[prefix], factors)
            projection.active_deltas, projection.active_rank = name, factors[0].shape[-1]

    def delete_deltas(self, name: str) -> None:
        """Forget a set that is not active.

        Raises:
            ValueError: if there is no such set, or it is the active one.
        """
        if self._check_name(name) == self.active_deltas:
            raise ValueError(f"The deltas {name!r} are active; switch with set_deltas to others before.")
        for projection in self._delta_projections().values():
            del projection.held_deltas[name]

    @torch.no_grad()
    def resize_deltas(self, rank: int) -> None:
        """Make room for sets of up to `rank`; what the model computes stays the same.

        The parameters get new storage, so make optimizers after this; compiled graphs are compiled again.

        Raises:
            ValueError: if a set has a higher rank.
        """
        projections = self._delta_projections()
        for name in self.delta_names:
            needed = min(self.delta_state_dict(name).items())[1].shape[-1]
            if rank < needed:
                raise ValueError(f"delta_rank={rank}: the deltas {name!r} have rank {needed}; truncate them before.")
        if any(parameter.device.type == "meta" for parameter in self.delta_parameters()):
            raise ValueError("The projector is offloaded, so its deltas cannot be resized; load it to a device.")
        self._unmerge_with_warning()
        for projection in projections.values():
            old = factors_of(projection)
            kept = trimmed(*old, projection.active_rank)
            shape_u, shape_v = shapes_at(kept[0].shape, kept[1].shape, rank)
            new = kept[0].new_zeros(shape_u), kept[1].new_zeros(shape_v)
            fill(new, kept)
            for parameter, tensor in zip(old, new):
                parameter.grad = None
                parameter.data = tensor
        self.config.delta_rank = rank

    @torch.no_grad()
    def merge_deltas(self, safe: bool = True) -> None:
        """Add base and deltas up ahead, in float32, so that the forward pass does one product instead of three.

        The sums are kept beside the parameters, in their dtype, and are not in the state dict. So this costs the memory
        of the base matrices once more (19 MB at 7B in bfloat16; where levels share a base, once per level), nothing
        that is saved while merged can apply its deltas twice, and `unmerge_deltas` restores the exact bits: they never
        left. What is merged gets no gradient; `train()`, `set_deltas` and loading a state dict unmerge. To write a repo
        whose base has the deltas in it: `delta-llava delta merge`. A second call warns and does nothing.

        Args:
            safe: refuse sums that are not finite.

        Raises:
            ValueError: if a sum is not finite and `safe`.
        """
        projections = self._delta_projections()
        if self._is_merged():
            warnings.warn("The deltas are merged already, nothing to do.", stacklevel=2)
            return
        merged = {}
        for name, updates in applied_updates(self.config).items():
            weight, factors = resident(projections[name], "weight"), factors_of(projections[name])
            sums = [weight.float() + delta_weight(*factors, update) for update in updates]
            merged[name] = torch.stack([total.to(weight.dtype) for total in sums])
            if safe and not torch.isfinite(merged[name]).all():
                raise ValueError(f"{name}: base and deltas add up to NaN or Inf, so nothing was merged.")
        for name, updates in applied_updates(self.config).items():
            projection = projections[name]
            device = next(
                (hook.execution_device for hook in hooks(projection) if hasattr(hook, "execution_device")), None
            )
            projection.merged_weights = merged[name] if device is None else merged[name].to(device)
            projection.merged_updates = {update: index for index, update in enumerate(updates)}

    def unmerge_deltas(self) -> None:
        """Undo `merge_deltas`, to the bit. Warns where nothing is merged."""
        if not self._is_merged():
            warnings.warn("No deltas are merged, nothing to do.", stacklevel=2)
        for projection in self._delta_projections().values():
            projection.unmerge()

    def set_deltas_trainable(self, freeze_others: bool = True) -> None:
        """Give gradients to the active deltas, and by default to nothing else.

        The forward and backward pass are low-rank then: no product of the factors, no gradient of a base. Merged deltas
        are unmerged, with a warning. Small steps vanish in bfloat16: load the model in float32, or make the deltas
        float32 (`p.data = p.data.float()`) and run under autocast, as recipes do.

        Args:
            freeze_others: take gradients off every other parameter; `False` leaves them, such as PEFT's adapters, as
                they are. PEFT freezes the deltas when it wraps a model, so call this afterwards.
        """
        deltas = list(self.delta_parameters())
        self._unmerge_with_warning()
        if freeze_others:
            self.requires_grad_(False)  # type: ignore[attr-defined]
        for parameter in deltas:
            parameter.requires_grad_(True)

    def _delta_projections(self) -> dict[str, DeltaProjection]:
        if not self.config.use_delta_projection:
            raise ValueError("use_delta_projection=False: this model has no deltas; load one that was made with them.")
        projector = self.base_model.multi_modal_projector  # type: ignore[attr-defined]
        # By attribute: where PEFT trains a copy of the projector, its wrapper hands out the copy's.
        return {name: getattr(projector, name) for name in applied_updates(self.config)}

    def _base_weights(self) -> dict[str, torch.Tensor]:
        return {name: resident(projection, "weight") for name, projection in self._delta_projections().items()}

    def _check_name(self, name: str | None) -> str:
        names = self.delta_names
        if name is not None and name not in names:
            raise ValueError(f"There are no deltas named {name!r}; there are {', '.join(map(repr, names))}.")
        return names[0] if name is None else name

    def _is_merged(self) -> bool:
        return any(projection.is_merged for projection in self._delta_projections().values())

    def _unmerge_with_warning(self) -> None:
        if self._is_merged():
            warnings.warn("The deltas were merged; they are unmerged for this.", stacklevel=3)
            self.unmerge_deltas()

    def _fit(
        self, state_dict: Mapping[str, torch.Tensor], where: str = ""
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], int]:
        """Deltas by projection, in the model's dtype, and their rank; ValueError where they do not fit."""
        projections = self._delta_projections()
        own = {n: (p.get_parameter("delta_u"), p.get_parameter("delta_v")) for n, p in projections.items()}
        shapes = {name: (tuple(u.shape), tuple(v.shape)) for name, (u, v) in own.items()}
        tensors, rank = check_deltas(state_dict, shapes, where)
        if rank > self.config.delta_rank:
            raise ValueError(
                f"{where}the deltas have rank {rank}, more than this model's delta_rank={self.config.delta_rank}; call "
                f"resize_deltas({rank}), or truncate them."
            )
        fitting = {}
        for name, factors in tensors.items():
            dtype = own[name][0].dtype
            for factor, tensor in zip(FACTORS, factors):
                if not torch.isfinite(tensor.to(dtype)).all():
                    raise ValueError(f"{where}{name}.{factor} holds NaN or Inf.")
            delta_u, delta_v = (tensor.detach().to(dtype) for tensor in factors)
            fitting[name] = (delta_u, delta_v)
        return fitting, rank
