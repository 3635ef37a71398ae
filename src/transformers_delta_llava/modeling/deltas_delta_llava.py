"""Low-rank deltas that users save, load, swap and merge: named sets of updates on one base.

A *set* is the `delta_u` and `delta_v` of every DeltaProjection. One set is active: it is in the parameters. The first is
called "default". The others are held beside the parameters, outside the state dict.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .delta_projection_delta_llava import (
    FACTORS,
    DeltaProjection,
    Factors,
    check_deltas,
    copy_factors,
    delta_weight,
    hooks,
    init_factor,
    materialize,
    materialize_factors,
    truncate,
)
from .delta_repo_delta_llava import (
    describe_deltas,
    hashes_of_base,
    is_base,
    read_delta_config,
    read_delta_tensors,
    write_delta_repo,
)


class DeltaMixin:
    """The methods for deltas, of the base model and of the model with a head alike.

    All of them check everything before they change anything: after an error the model is as it was. Tensors are named
    as in the projector, `query.delta_u`. Swapping writes into the parameters that are there, so optimizers, compiled
    graphs and other references to them stay valid.

    Sets may differ in rank. The parameters have rank `config.delta_rank`; a set of lower rank fills its part of them,
    and zeros the rest, which get no gradient and stay zero. A set of higher rank needs `resize_deltas` first.

    Every method raises `ValueError` if the model has no deltas (`use_delta_projection=False`).
    """

    config: Any

    def delta_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the active deltas, `delta_u` and `delta_v` of each projection, for an optimizer."""
        for projection in self._delta_projections().values():
            yield from (getattr(projection, factor) for factor in FACTORS)

    @property
    def delta_names(self) -> list[str]:
        """Names of all sets, in the order of loading."""
        return list(self._first_projection().delta_sets)

    @property
    def active_deltas(self) -> str:
        """Name of the active set."""
        return self._first_projection().active_deltas

    def delta_state_dict(self, name: str | None = None) -> dict[str, torch.Tensor]:
        """A set's tensors by name, at its own rank, detached; like `state_dict()` it shares memory with the model.

        Args:
            name: of the set; the active one by default.

        Raises:
            ValueError: if there is no such set.
        """
        name = self._check_name(name)
        state_dict: dict[str, torch.Tensor] = {}
        for prefix, projection in self._delta_projections().items():
            factors = projection.delta_sets[name]
            if factors is None:
                factors = truncate(*materialize_factors(projection), projection.active_rank)
            state_dict |= {f"{prefix}.{factor}": tensor.detach() for factor, tensor in zip(FACTORS, factors)}
        return state_dict

    @torch.no_grad()
    def load_delta_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Overwrite the active set.

        Args:
            state_dict: as `delta_state_dict` gives it, of any float dtype and device, of any rank that fits. Names may
                have what leads to the projector before them (`model.multi_modal_projector.query.delta_u`).

        Raises:
            ValueError: on tensors that are missing, too many, misshapen, or not finite in the model's dtype, or while
                the deltas are merged.
        """
        projections = self._delta_projections()
        if self._is_merged():
            raise ValueError("The deltas are merged; call unmerge_deltas() before you overwrite them.")
        factors, rank = self._check_deltas(state_dict)
        targets = {name: materialize_factors(projection, write=True) for name, projection in projections.items()}
        for name, projection in projections.items():
            copy_factors(factors[name], targets[name])
            projection.active_rank = rank

    def save_deltas(
        self,
        folder: str | os.PathLike,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a set as a delta repo: `deltas.safetensors`, `delta_config.json`, `README.md`.

        Works while merged, too: the base is what it was.

        Args:
            folder: appears when it is complete; it must not exist, or be empty.
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

    def push_deltas_to_hub(
        self,
        repo_id: str,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload deltas",
    ) -> str:
        """Upload a set as a delta repo, in one commit; the repo is created where there is none.

        Args:
            repo_id: of the repo on the Hub, `owner/name`.
            name: of the set; the active one by default.
            dtype: of the file; the model's by default.
            private: whether a new repo is private; the owner's default when `None`.
            token: of a login that may write there; the stored one by default.
            commit_message: of the commit.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: as `save_deltas`, before the Hub is asked for anything.
            huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
        """
        from huggingface_hub import HfApi  # transformers needs it, too

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            self.save_deltas(folder, name, dtype)
            api = HfApi(token=token)
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(
                repo_id=repo.repo_id, folder_path=folder, commit_message=commit_message
            ).commit_url

    @torch.no_grad()
    def load_deltas(
        self,
        model_id: str | os.PathLike,
        name: str | None = None,
        force: bool = False,
        activate: bool = True,
        **hub_kwargs: Any,
    ) -> str:
        """Add a delta repo as a new set, and switch to it. Reads the repo alone; the base is hashed in memory, once.

        Args:
            model_id: a folder, or a repo on the Hub.
            name: for the set; the last part of `model_id` by default.
            force: accept deltas of another base. Shapes that do not fit are refused all the same.
            activate: switch to it; otherwise it is held until `set_deltas`.
            hub_kwargs: `revision`, `token`, `subfolder`, `cache_dir`, ... as for `from_pretrained`.

        Returns:
            The name of the set.

        Raises:
            ValueError: if the name is taken, or on another layout, base, rank or shape, on tensors that are missing
                or too many, or on values that are not finite in the model's dtype.
            OSError: if the repo cannot be read.
        """
        name = name or Path(str(model_id)).name or Path(model_id).resolve().name
        self._check_new_name(name)
        config = read_delta_config(model_id, **hub_kwargs)
        for field in ("projector_layout", "delta_sharing"):
            if config.get(field) != getattr(self.config, field):
                raise ValueError(
                    f"{model_id}: {field}={config.get(field)!r} of these deltas is not the model's, "
                    f"{getattr(self.config, field)!r}."
                )
        factors, rank = self._check_deltas(read_delta_tensors(model_id, **hub_kwargs), f"{model_id}: ")
        if rank != config["delta_rank"]:
            raise ValueError(
                f"{model_id}: delta_rank={config['delta_rank']!r} in its config, but its tensors have rank {rank}."
            )
        if not force and not is_base(self._base_weights(), config["base_sha256"]):
            raise ValueError(
                f"{model_id}: these deltas belong to another base "
                f"({config.get('base_model_name_or_path') or 'unnamed'}) than this model's "
                f"({getattr(self.config, 'name_or_path', None) or 'unnamed'}); load that one, or pass force=True."
            )
        self._add_set(name, factors, activate)
        return name

    @torch.no_grad()
    def add_deltas(self, name: str, rank: int | None = None, activate: bool = True) -> None:
        """Add a new set to train, and switch to it. It changes nothing yet: `delta_v` is zero, `delta_u` is drawn.

        Args:
            name: for the set.
            rank: of the set; `config.delta_rank` by default.
            activate: switch to it; otherwise it is held until `set_deltas`.

        Raises:
            ValueError: if the name is taken, or on a rank outside 1 to `config.delta_rank`.
        """
        rank = self.config.delta_rank if rank is None else rank
        self._check_new_name(name)
        if not 1 <= rank <= self.config.delta_rank:
            raise ValueError(
                f"rank={rank}: use 1 to delta_rank={self.config.delta_rank}, or make room with resize_deltas."
            )
        factors = {}
        for prefix, projection in self._delta_projections().items():
            own = materialize(projection, "delta_u")
            delta_u, delta_v = (own.new_zeros(shape) for shape in projection.spec.factor_shapes(rank))
            init_factor(delta_u)
            factors[prefix] = (delta_u, delta_v)
        self._add_set(name, factors, activate)

    @torch.no_grad()
    def set_deltas(self, name: str) -> None:
        """Switch to another set, in time and memory of the deltas alone; no base parameter is read or written.

        Merged deltas are unmerged, with a warning, unless the set is active already. An optimizer's moments stay with
        the parameters, not with the set.

        Raises:
            ValueError: if there is no such set.
        """
        if self._check_name(name) == self.active_deltas:
            return
        projections = self._delta_projections()
        targets = {prefix: materialize_factors(projection, write=True) for prefix, projection in projections.items()}
        self._unmerge_with_warning()
        for prefix, projection in projections.items():
            delta_u, delta_v = truncate(*targets[prefix], projection.active_rank)
            factors = projection.delta_sets[name]
            assert factors is not None
            projection.delta_sets[projection.active_deltas] = (delta_u.detach().clone(), delta_v.detach().clone())
            projection.delta_sets[name] = None
            copy_factors(factors, targets[prefix])
            projection.active_deltas, projection.active_rank = name, factors[0].shape[-1]

    def delete_deltas(self, name: str) -> None:
        """Forget a set that is not active.

        Raises:
            ValueError: if there is no such set, or it is the active one.
        """
        if self._check_name(name) == self.active_deltas:
            raise ValueError(f"The deltas {name!r} are active; switch to others with set_deltas first.")
        for projection in self._delta_projections().values():
            del projection.delta_sets[name]

    @contextmanager
    def disable_deltas(self) -> Iterator[None]:
        """Within a `with` block, compute with the bases alone, merged or not."""
        projections = self._delta_projections().values()
        before = [projection.deltas_enabled for projection in projections]
        try:
            for projection in projections:
                projection.deltas_enabled = False
            yield
        finally:
            for projection, enabled in zip(projections, before):
                projection.deltas_enabled = enabled

    @torch.no_grad()
    def resize_deltas(self, rank: int) -> None:
        """Make room for sets of up to `rank`; what the model computes stays the same.

        The parameters get new storage, so make optimizers after this; compiled graphs are compiled again.

        Raises:
            ValueError: if a set has a higher rank.
        """
        projections = self._delta_projections()
        for name in self.delta_names:
            needed = next(iter(self.delta_state_dict(name).values())).shape[-1]
            if rank < needed:
                raise ValueError(f"delta_rank={rank}: the deltas {name!r} have rank {needed}; truncate them before.")
        if any(parameter.device.type == "meta" for parameter in self.delta_parameters()):
            raise ValueError("The projector is offloaded, so its deltas cannot be resized; load it to a device.")
        self._unmerge_with_warning()
        for projection in projections.values():
            parameters = materialize_factors(projection)
            delta_u, delta_v = (parameters[0].new_zeros(shape) for shape in projection.spec.factor_shapes(rank))
            copy_factors(truncate(*parameters, projection.active_rank), (delta_u, delta_v))
            for parameter, tensor in zip(parameters, (delta_u, delta_v)):
                parameter.grad = None
                parameter.data = tensor
        self.config.delta_rank = rank

    @torch.no_grad()
    def merge_deltas(self, safe_merge: bool = True) -> None:
        """Add base and deltas up ahead, in float32, so that the forward pass does one product instead of three.

        The sums are kept beside the parameters, in their dtype, and are not in the state dict. So this costs the memory
        of the base matrices once more (19 MB at 7B in bfloat16; where levels share a base, once per level), nothing
        that is saved while merged can apply its deltas twice, and `unmerge_deltas` restores the exact bits: they never
        left. What is merged gets no gradient; `train()`, `set_deltas` and loading a state dict unmerge. To write a repo
        whose base has the deltas in it: `delta-llava delta merge`. A second call warns and does nothing.

        Args:
            safe_merge: refuse sums that are not finite.

        Raises:
            ValueError: if a sum is not finite and `safe_merge`.
        """
        if self._is_merged():
            warnings.warn("The deltas are merged already, nothing to do.", stacklevel=2)
            return
        merged = {}
        for name, projection in self._delta_projections().items():
            weight, factors = materialize(projection, "weight"), materialize_factors(projection)
            sums = [weight.float() + delta_weight(*factors, update) for update in projection.spec.updates]
            merged[name] = torch.stack([total.to(weight.dtype) for total in sums])
            if safe_merge and not torch.isfinite(merged[name]).all():
                raise ValueError(f"{name}: base and deltas add up to NaN or Inf, so nothing was merged.")
        for name, projection in self._delta_projections().items():
            device = next(
                (hook.execution_device for hook in hooks(projection) if hasattr(hook, "execution_device")), None
            )
            projection.merged_weights = merged[name] if device is None else merged[name].to(device)

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
            raise ValueError(
                "use_delta_projection=False: this model has no deltas; load one that was trained with them."
            )
        # Through the attribute: where PEFT trains a copy of the projector, its wrapper hands out the copy's.
        return self.base_model.multi_modal_projector.delta_projections()  # type: ignore[attr-defined]

    def _first_projection(self) -> DeltaProjection:
        return next(iter(self._delta_projections().values()))

    def _base_weights(self) -> dict[str, torch.Tensor]:
        return {name: materialize(projection, "weight") for name, projection in self._delta_projections().items()}

    def _check_name(self, name: str | None) -> str:
        names = self.delta_names
        if name is not None and name not in names:
            raise ValueError(f"There are no deltas named {name!r}; there are {', '.join(map(repr, names))}.")
        return self.active_deltas if name is None else name

    def _check_new_name(self, name: str) -> None:
        if name in self.delta_names:
            raise ValueError(
                f"There are deltas named {name!r} already; pass another name, or delete_deltas({name!r})."
            )

    def _add_set(self, name: str, factors: dict[str, Factors], activate: bool) -> None:
        """Hold a set of checked factors beside the parameters, on their device."""
        projections = self._delta_projections()
        # All of them first: this refuses projectors that cannot be written to.
        targets = {
            prefix: materialize_factors(projection, write=activate) for prefix, projection in projections.items()
        }
        for prefix, projection in projections.items():
            delta_u, delta_v = (tensor.to(targets[prefix][0].device) for tensor in factors[prefix])
            projection.delta_sets[name] = (delta_u, delta_v)
        if activate:
            self.set_deltas(name)

    def _is_merged(self) -> bool:
        return any(projection.is_merged for projection in self._delta_projections().values())

    def _unmerge_with_warning(self) -> None:
        if self._is_merged():
            warnings.warn("The deltas were merged; they are unmerged for this.", stacklevel=3)
            self.unmerge_deltas()

    def _check_deltas(self, state_dict: Mapping[str, torch.Tensor], where: str = "") -> tuple[dict[str, Factors], int]:
        """Deltas by projection, in the model's dtype, and their rank; ValueError where they do not fit."""
        projections = self._delta_projections()
        factors, rank = check_deltas(state_dict, {name: p.spec for name, p in projections.items()}, where)
        if rank > self.config.delta_rank:
            raise ValueError(
                f"{where}the deltas have rank {rank}, more than this model's delta_rank={self.config.delta_rank}; call "
                f"resize_deltas({rank}), or truncate them."
            )
        for name, pair in factors.items():
            dtype = projections[name].get_parameter("delta_u").dtype
            delta_u, delta_v = (tensor.detach().to(dtype) for tensor in pair)
            for factor, tensor in zip(FACTORS, (delta_u, delta_v)):
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{where}{name}.{factor} holds NaN or Inf.")
            factors[name] = (delta_u, delta_v)
        return factors, rank
