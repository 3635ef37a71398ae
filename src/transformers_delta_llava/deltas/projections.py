"""The DeltaProjections of a repo, of a checkpoint in the authors' layout, or of a delta repo; no model is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..conversion.config import DEFAULTS
from ..conversion.names import PROJECTOR, SOURCE_PROJECTOR, map_names
from ..conversion.sources import PROJECTOR_FILE, open_trained
from ..conversion.weights import LazyTensor, open_weights, read_checkpoint
from ..loading import load_config
from ..modeling.delta_projection_delta_llava import (
    FACTORS,
    Factors,
    ProjectionSpec,
    Update,
    check_deltas,
    pick_update,
    projection_specs,
)
from ..modeling.delta_repo_delta_llava import DELTA_CONFIG, DELTA_WEIGHTS, read_delta_config
from ..utils.errors import format_names, show
from ..utils.files import local_folder, public_name, read_optional_json


_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", PROJECTOR_FILE)


@dataclass(frozen=True)
class Projections:
    """The DeltaProjections of one projector.

    Attributes:
        name: Hub id, or the folder's last part.
        folder: where the files lie.
        layout, sharing: `projector_layout` and `delta_sharing` of the config.
        levels: which hidden states of the tower the levels are; 0, 1, ... where the source does not say.
        specs: of `projection_specs`.
        deltas: `delta_u` and `delta_v` by projection; empty where there are none.
        rank: of the deltas; 0 where there are none.
        weights: the bases by projection, (out, in); empty in a delta repo.
        others: the projector's other tensors.
        config: of a delta repo, its `delta_config.json`.
    """

    name: str
    folder: Path
    layout: str
    sharing: str
    levels: list[int]
    specs: dict[str, ProjectionSpec]
    deltas: dict[str, Factors]
    rank: int
    weights: dict[str, torch.Tensor]
    others: dict[str, LazyTensor]
    config: dict = field(default_factory=dict)

    def updates(self) -> list[tuple[str, Update]]:
        """Every update that the projector applies, with the name of its projection."""
        return [(name, update) for name, spec in self.specs.items() for update in spec.updates]

    def factors(self, name: str, update: Update) -> Factors:
        """The factors (in, r) and (r, out) of an update; of a sum over levels, one pair."""
        return pick_update(*self.deltas[name], update)

    def merged_weight(self, name: str, update: Update, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Base (by default its own) and update together, (out, in) in float64."""
        weight = (self.weights[name] if weight is None else weight).double()
        if not self.deltas:
            return weight
        u, v = self.factors(name, update)
        return weight + (u.double() @ v.double()).T


def read_projections(model_id: str | Path, need_deltas: bool = True) -> Projections:
    """Read a repo, a checkpoint in the authors' layout (whole, or its `mm_projector.bin`), or a delta repo.

    Args:
        model_id: folder or Hub id.
        need_deltas: refuse a source without them.

    Raises:
        ValueError: the source is none of these, or not complete.
    """
    folder, name = local_folder(str(model_id), "model", _FILES), public_name(str(model_id))
    if (folder / DELTA_CONFIG).is_file():
        result = _read_delta_repo(folder, name)
    elif read_optional_json(folder / "config.json").get("model_type") == "delta_llava":
        config = load_config(folder)
        stored = read_checkpoint(folder).tensors
        tensors = {n.removeprefix(PROJECTOR): tensor for n, tensor in stored.items() if n.startswith(PROJECTOR)}
        levels = config.vision_feature_levels
        result = _collect(name, folder, config.projector_layout, config.delta_sharing, levels, tensors)
    else:
        result = _read_checkpoint(folder, name)
    if need_deltas and not result.deltas:
        raise ValueError(f"{name} has no deltas (use_delta_projection=False).")
    return result


def _read_delta_repo(folder: Path, name: str) -> Projections:
    config = read_delta_config(folder)
    tensors = open_weights(folder / DELTA_WEIGHTS)
    layout, sharing = config["projector_layout"], config.get("delta_sharing", "levels")
    levels = range(_count_levels(tensors, layout))
    result = _collect(name, folder, layout, sharing, levels, tensors, config)
    if result.rank != config["delta_rank"]:
        raise ValueError(
            f"{name}: delta_rank={show(config['delta_rank'])} in its config, but its tensors have rank {result.rank}."
        )
    return result


def _read_checkpoint(folder: Path, name: str) -> Projections:
    checkpoint = open_trained(folder)
    source = {n: tensor for n, tensor in checkpoint.tensors.items() if n.startswith(SOURCE_PROJECTOR)}
    if not source:
        raise ValueError(f"{name} is not a Delta-LLaVA: no tensor in it is called {SOURCE_PROJECTOR}...")
    tensors = {target.removeprefix(PROJECTOR): source[n] for n, target in map_names(source).items()}
    count = _count_levels(tensors, "released")
    settings = read_optional_json(folder / "config.json")
    levels = settings.get("mm_vision_feature_levels", list(DEFAULTS["vision_feature_levels"]))
    if not isinstance(levels, list) or len(levels) != count:
        levels = range(count)
    return _collect(name, folder, "released", "levels", levels, tensors)


def _count_levels(tensors: Mapping[str, LazyTensor], layout: str) -> int:
    """How many levels a projector reads, by its shapes; 1 where they do not fit, which `_collect` refuses."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        if layout == "paper":
            return shapes.get("qkv.delta_u", shapes.get("key.delta_u", ()))[-3]
        if "key.weight" in shapes:
            return shapes["key.weight"][1] // shapes["query.weight"][1]
        return shapes["key.delta_u"][-2] // shapes["query.delta_u"][-2]
    except (KeyError, IndexError):
        return 1


def _collect(
    name: str,
    folder: Path,
    layout: str,
    sharing: str,
    levels: Sequence[int],
    tensors: Mapping[str, LazyTensor],
    config: dict | None = None,
) -> Projections:
    """Check and load the tensors of a projector, or with the `config` of a delta repo those of its deltas alone."""
    query = "qkv" if sharing == "all" else "query"
    known = tensors.get(f"{query}.delta_v" if config else f"{query}.weight")
    width = known.shape[-1] if known is not None and known.shape else 0  # a tensor that is missing is refused below
    specs = projection_specs(layout, sharing, len(levels), width)
    bases = {} if config else {f"{projection}.weight": spec for projection, spec in specs.items()}
    if missing := sorted(bases.keys() - tensors.keys()):
        raise ValueError(f"{name}: there is no {format_names(missing)}.")
    factors = {f"{projection}.{factor}" for projection in specs for factor in FACTORS}
    loaded = {n: tensor.load() for n, tensor in tensors.items() if config or n in factors or n in bases}
    weights = {n.removesuffix(".weight"): loaded.pop(n) for n in bases}
    for projection, weight in weights.items():
        expected = specs[projection].out_features, specs[projection].in_features
        if weight.shape != expected:
            raise ValueError(f"{name}: {projection}.weight is {tuple(weight.shape)}, and should be {expected}.")
    deltas, rank = check_deltas(loaded, specs, f"{name}: ") if loaded or config else ({}, 0)
    for n, tensor in loaded.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: {n} holds NaN or Inf.")
    others = {n: tensor for n, tensor in tensors.items() if n not in factors and n not in bases}
    return Projections(name, folder, layout, sharing, list(levels), specs, deltas, rank, weights, others, config or {})
