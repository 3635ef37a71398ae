"""The DeltaProjections of a repo, of a checkpoint in the authors' layout, or of a delta repo; no model is built."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..conversion.checkpoint import Checkpoint, LazyTensor, open_weights, read_checkpoint
from ..conversion.config_mapping import DEFAULTS
from ..conversion.export import read_repo_config
from ..conversion.sources import PROJECTOR_FILE, open_trained
from ..conversion.weight_mapping import PROJECTOR, SOURCE_PROJECTOR, map_names
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
from ..utils.errors import format_names
from ..utils.files import local_folder, public_name, read_json


_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", PROJECTOR_FILE)


@dataclass
class Projections:
    """What belongs to the DeltaProjections of one projector.

    Attributes:
        name: Hub id, or the folder's last part.
        folder: where the files lie.
        layout, sharing: `projector_layout` and `delta_sharing` of the config.
        deltas: `delta_u` and `delta_v` by projection.
        rank: of the deltas; 0 where there are none.
        weights: the bases by projection; none in a delta repo.
        others: the projector's other tensors.
        specs: of `projection_specs`.
        level_names: which hidden states of the tower the levels are; their positions, where nobody says.
        config: of a delta repo, its `delta_config.json`.
    """

    name: str
    folder: Path
    layout: str
    sharing: str
    deltas: dict[str, Factors]
    rank: int
    weights: dict[str, torch.Tensor]
    others: dict[str, LazyTensor]
    specs: dict[str, ProjectionSpec]
    level_names: list[int]
    config: dict = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The deltas by the names they have in a delta repo."""
        pairs = ((name, pair) for name, pair in self.deltas.items())
        return {f"{n}.{f}": tensor for n, pair in pairs for f, tensor in zip(FACTORS, pair)}

    def pairs(self) -> dict[tuple[str, Update], Factors]:
        """The factor pair of every update that the projector applies; of a sum over levels, one pair."""
        return {
            (name, update): pick_update(*self.deltas[name], update)
            for name, spec in self.specs.items()
            for update in spec.updates
        }


def read_projections(spec: str | Path, need_deltas: bool = True) -> Projections:
    """Read a repo, a checkpoint in the authors' layout (whole, or its `mm_projector.bin`), or a delta repo.

    Args:
        spec: folder or Hub id.
        need_deltas: refuse a source without them.

    Raises:
        ValueError: what is there is none of these, or not whole.
    """
    folder = local_folder(str(spec), "model", _FILES)
    name = public_name(str(spec))
    if (folder / DELTA_CONFIG).is_file():
        found = _read_delta_repo(folder, name)
    elif (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "delta_llava":
        found = _read_repo(folder, name)
    else:
        found = _read_checkpoint(folder, name)
    if need_deltas and not found.deltas:
        raise ValueError(f"{name} has no deltas (use_delta_projection=False).")
    return found


def effective(
    model: Projections, name: str, update: tuple[int, ...], weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Base (the model's own by default) and update together, (out, in) in float64."""
    weight = (model.weights[name] if weight is None else weight).double()
    if not model.deltas:
        return weight
    u, v = model.pairs()[name, update]
    return weight + (u.double() @ v.double()).T


def _read_delta_repo(folder: Path, name: str) -> Projections:
    config = read_delta_config(folder)
    tensors = {n: tensor.load() for n, tensor in open_weights(folder / DELTA_WEIGHTS).items()}
    layout, sharing = str(config["projector_layout"]), str(config.get("delta_sharing", "levels"))
    one = tensors.get("qkv_proj.delta_u" if sharing == "all" else "k_proj.delta_u")
    query = tensors.get("q_proj.delta_u")
    levels = 1  # where the factors have other dimensions, `_assemble` says so
    if layout == "released" and one is not None and query is not None and one.dim() == query.dim() == 2:
        levels = one.shape[0] // query.shape[0]
    elif layout == "paper" and one is not None and one.dim() > 2:
        levels = one.shape[-3]
    found = _assemble(name, folder, layout, sharing, list(range(levels)), tensors, {})
    if found.rank != config["delta_rank"]:
        raise ValueError(
            f"{name}: delta_rank={config['delta_rank']!r} in its config, but its tensors have rank {found.rank}."
        )
    found.config = config
    return found


def _read_repo(folder: Path, name: str) -> Projections:
    config = read_repo_config(folder)
    tensors = _below(read_checkpoint(folder), PROJECTOR)
    return _assemble(
        name, folder, config.projector_layout, config.delta_sharing, config.vision_feature_levels, {}, tensors
    )


def _read_checkpoint(folder: Path, name: str) -> Projections:
    checkpoint = open_trained(folder)
    if checkpoint is None:
        raise ValueError(
            f"{name} holds neither deltas nor a model: no {DELTA_CONFIG}, no weights, no {PROJECTOR_FILE}."
        )
    source = {n: tensor for n, tensor in checkpoint.tensors.items() if n.startswith(SOURCE_PROJECTOR)}
    if not source:
        raise ValueError(f"{name} is no Delta-LLaVA: no tensor in it is called {SOURCE_PROJECTOR}...")
    tensors = {target.removeprefix(PROJECTOR): source[n] for n, (target, _) in map_names(source).rules.items()}
    wide, narrow = tensors.get("k_proj.weight"), tensors.get("q_proj.weight")
    levels = 1
    if wide is not None and narrow is not None and len(wide.shape) > 1 and len(narrow.shape) > 1:
        levels = wide.shape[1] // narrow.shape[1]
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = settings.get("mm_vision_feature_levels", list(DEFAULTS["vision_feature_levels"]))
    names = named if isinstance(named, list) and len(named) == levels else list(range(levels))
    return _assemble(name, folder, "released", "levels", names, {}, tensors)


def _below(checkpoint: Checkpoint, prefix: str) -> dict[str, LazyTensor]:
    return {n.removeprefix(prefix): tensor for n, tensor in checkpoint.tensors.items() if n.startswith(prefix)}


def _assemble(
    name: str,
    folder: Path,
    layout: str,
    sharing: str,
    level_names: list[int],
    deltas: dict[str, torch.Tensor],
    lazy: dict[str, LazyTensor],
) -> Projections:
    """Sort the tensors: `deltas` as they are in a delta repo, or everything in the projector (`lazy`)."""
    query = "qkv_proj" if sharing == "all" else "q_proj"
    known = lazy.get(f"{query}.weight", deltas.get(f"{query}.delta_v"))
    width = (
        known.shape[-1] if known is not None and known.shape else 0
    )  # what is missing or misshapen is refused below
    specs = projection_specs(layout, sharing, len(level_names), width)
    bases = {f"{projection}.weight": projection for projection in specs}
    factors = {f"{projection}.{factor}" for projection in specs for factor in FACTORS}
    if lazy and (missing := sorted(bases.keys() - lazy.keys())):
        raise ValueError(f"{name}: there is no {format_names(missing)}.")
    deltas = deltas or {n: tensor.load() for n, tensor in lazy.items() if n in factors}
    weights = {bases[n]: tensor.load() for n, tensor in lazy.items() if n in bases}
    for projection, weight in weights.items():
        expected = specs[projection].out_features, specs[projection].in_features
        if weight.shape != expected:
            raise ValueError(f"{name}: {projection}.weight is {tuple(weight.shape)}, and should be {expected}.")
    others = {n: tensor for n, tensor in lazy.items() if n not in factors and n not in bases}
    pairs: dict[str, Factors] = {}
    rank = 0
    if deltas:
        pairs, rank = check_deltas(deltas, specs, f"{name}: ")
        for n, tensor in deltas.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: {n} holds NaN or Inf.")
    return Projections(name, folder, layout, sharing, pairs, rank, weights, others, specs, list(level_names))
