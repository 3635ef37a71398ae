"""Extract, truncate and merge deltas on disk. Of a model only the projector is loaded."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .errors import DeltaLlavaError, output_folder, read_json, write_json
from .loading import load_config, local_folder
from .modeling import PROJECTORS, DeltaLlavaModel
from .modeling.deltas_delta_llava import (
    DELTA_WEIGHTS,
    FACTORS,
    DeltaProjection,
    Factors,
    hash_base,
    init_factor,
    read_deltas,
    write_deltas,
)


__all__ = ["Written", "extract", "merge", "truncate"]

PROJECTOR = "model.multi_modal_projector."
INDEX = "model.safetensors.index.json"


class Written(NamedTuple):
    """What `extract` and `truncate` wrote.

    rank: of the deltas.
    energy: share of the squared Frobenius norm that they keep, before rounding to their dtype.
    left_out: other tensors of the two projectors that differ; deltas cannot hold them.
    """

    rank: int
    energy: float = 1.0
    left_out: tuple[str, ...] = ()


@torch.no_grad()
def extract(
    source: str | Path, output: str | Path, base: str | Path | None = None, rank: int | None = None
) -> Written:
    """Write the deltas of a model, or with `base` the best approximation of what turns that base into the model.

    Args:
        source: folder or Hub id of a repo.
        output: folder to write; an earlier `deltas.safetensors` in it is replaced.
        base: folder or Hub id of the repo that `source` was fine-tuned from. The difference between the projections of
            `source` (bases and deltas) and the bases of `base` is approximated by its largest singular values.
        rank: with `base`; by default the `delta_rank` of `source`.

    Raises:
        ValueError: `source` has no deltas, and there is no `base`.
        RuntimeError: the projectors differ in shapes.
    """
    tuned = load_projector(source)
    if base is None:
        tuned.save_deltas(output)
        return Written(tuned.config.delta_rank)
    start = load_projector(base)
    rank = rank or tuned.config.delta_rank
    after, before = (model.multi_modal_projector.delta_projections() for model in (tuned, start))
    tensors: dict[str, torch.Tensor] = {}
    kept = total = 0.0
    for name, projection in before.items():
        sums = [after[name].summed_weight(level, torch.float64) for level in range(projection.num_updates)]
        left, values, right = torch.linalg.svd(
            (torch.stack(sums) - projection.weight.double()).mT, full_matrices=False
        )
        # A sum of n updates of rank r is one of rank n * r.
        most = rank * (projection.stack[0] if projection.stack and len(sums) == 1 else 1)
        factors = stack_factors(projection, best_factors(left, values, right, most), rank)
        tensors |= {f"{name}.{factor}": part.to(projection.weight.dtype) for factor, part in zip(FACTORS, factors)}
        kept += float(values[:, :most].square().sum())
        total += float(values.square().sum())
    bases = {name: projection.weight for name, projection in before.items()}
    write_deltas(output, tensors, start.config.projector_layout, hash_base(bases), hub_id(base))
    one, other = (
        {name: tensor for name, tensor in model.multi_modal_projector.state_dict().items() if not is_of(name, before)}
        for model in (tuned, start)
    )
    differing = [name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])]
    return Written(rank, kept / total if total else 1.0, tuple(sorted([*differing, *(one.keys() ^ other.keys())])))


def truncate(source: str | Path, output: str | Path, rank: int | None = None, energy: float | None = None) -> Written:
    """Write deltas at a lower rank: the best approximation of each update, by its largest singular values.

    Args:
        source: folder or Hub id of deltas, or of a model with deltas.
        output: folder to write; an earlier `deltas.safetensors` in it is replaced.
        rank: to keep, or
        energy: share of the squared Frobenius norm to keep, in every update; the lowest rank that does is taken.

    Raises:
        ValueError: neither or both of rank and energy, or the rank is higher than that of the deltas.
    """
    if (rank is None) == (energy is None):
        raise DeltaLlavaError("give either a rank or an energy")
    folder = local_folder(source, ("*.json", "*.safetensors"))
    if (folder / DELTA_WEIGHTS).is_file():
        deltas, metadata = read_deltas(folder)
    else:
        model = load_projector(source)
        bases = {name: part.weight for name, part in model.multi_modal_projector.delta_projections().items()}
        deltas = model.delta_state_dict()
        metadata = {"projector_layout": model.config.projector_layout, "base_sha256": hash_base(bases)}
        metadata |= {"base_model": str(source)} if hub_id(source) else {}
    parts = {
        name.removesuffix(".delta_u"): decompose(u, deltas[name.removesuffix("u") + "v"])
        for name, u in deltas.items()
        if name.endswith(".delta_u")
    }
    shares = {
        name: values.square().cumsum(-1) / values.square().sum(-1, True) for name, (_, values, _) in parts.items()
    }
    own = next(iter(shares.values())).shape[-1]
    if energy is not None:
        rank = min(own, 1 + max(int((share < energy - 1e-12).sum(-1).max()) for share in shares.values()))
    if not rank or not 1 <= rank <= own:
        raise DeltaLlavaError(f"rank={rank}: the deltas have rank {own}")
    tensors = {
        f"{name}.{factor}": tensor.to(deltas[f"{name}.{factor}"].dtype)
        for name, part in parts.items()
        for factor, tensor in zip(FACTORS, best_factors(*part, rank))
    }
    write_deltas(output, tensors, metadata["projector_layout"], metadata["base_sha256"], metadata.get("base_model"))
    squares = torch.stack([values.square().reshape(-1, own).sum(0) for _, values, _ in parts.values()]).sum(0)
    return Written(rank, float(squares[:rank].sum() / squares.sum()) if squares.any() else 1.0)


@torch.no_grad()
def merge(
    repo: str | Path, output: str | Path, deltas: str | Path | None = None, rank: int = 0, force: bool = False
) -> None:
    """Write a repo whose bases have the deltas added to them; all other weights keep their bits.

    Sums are rounded once, from float64: products in float32 differ between machines in the last bits, and with them the hash
    of the new bases. The repo has no deltas of its own (`use_delta_projection=False`), or with `rank` new ones to train:
    `delta_v` zero, `delta_u` drawn with seed 0. Deltas of the old bases are refused there.

    Args:
        repo: folder or Hub id of a repo.
        output: folder to write, which must not exist.
        deltas: folder or Hub id of deltas to merge; by default the model's own.
        rank: of the new deltas; 0 for none.
        force: accept deltas of another base.

    Raises:
        DeltaLlavaError: the output exists, or levels share a base (`projector_layout="paper"`), which has no room for an
            update per level.
        ValueError: the deltas do not fit or belong to another base, or a sum is not finite.
    """
    model = load_projector(repo)
    if model.config.projector_layout == "paper":
        raise DeltaLlavaError(
            "projector_layout='paper': levels share a base; merge_deltas() of a loaded model can merge them"
        )
    if deltas is not None:
        model.load_deltas(deltas, force=force)
    new: dict[str, torch.Tensor] = {}
    for name, projection in model.multi_modal_projector.delta_projections().items():
        weight = projection.summed_weight(dtype=torch.float64).to(projection.weight.dtype)
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}: base and deltas add up to NaN or Inf")
        new[f"{PROJECTOR}{name}.weight"] = weight
        if rank:
            shape_u, shape_v = projection.factor_shapes(rank)
            delta_u = new[f"{PROJECTOR}{name}.delta_u"] = weight.new_empty(shape_u)
            new[f"{PROJECTOR}{name}.delta_v"] = weight.new_zeros(shape_v)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                init_factor(delta_u)
    source = local_folder(repo, ("*.json", "*.safetensors"))
    with output_folder(Path(output)) as folder:
        files: dict[str, str] = {}
        for path in sorted(path for path in source.iterdir() if path.is_file()):
            if path.match("model*.safetensors"):
                files |= dict.fromkeys(_write_shard(path, folder / path.name, new), path.name)
            else:
                shutil.copyfile(path, folder / path.name)
        config = read_json(folder / "config.json")
        config |= {"use_delta_projection": bool(rank), "delta_rank": rank or config["delta_rank"]}
        write_json(config, folder / "config.json")
        if (folder / INDEX).is_file():
            write_json({**read_json(folder / INDEX), "weight_map": files}, folder / INDEX)
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            card.write(
                "\n## Deltas\n\nThe bases of the projector have deltas merged into them (`delta-llava delta merge`).\n"
            )


def load_projector(repo: str | Path) -> DeltaLlavaModel:
    """A model of a repo of which only the projector has weights, in the dtype of its file.

    Raises:
        DeltaLlavaError: `repo` is another kind of model.
        RuntimeError: its projector lacks weights, or they have other shapes.
    """
    folder = local_folder(repo, ("*.json", "*.safetensors"))
    config = load_config(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(PROJECTOR)]
            tensors |= {name.removeprefix(PROJECTOR): file.get_tensor(name) for name in names}
    with torch.device("meta"):
        model = DeltaLlavaModel(config)
        model.multi_modal_projector = PROJECTORS[config.projector_layout](config)
    model.multi_modal_projector.load_state_dict(tensors, assign=True)
    return model


def decompose(delta_u: torch.Tensor, delta_v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decomposition of `delta_u @ delta_v` in float64, without forming the product."""
    basis_u, core_u = torch.linalg.qr(delta_u.double())
    basis_v, core_v = torch.linalg.qr(delta_v.double().mT)
    left, values, right = torch.linalg.svd(core_u @ core_v.mT, full_matrices=False)
    return basis_u @ left, values, right @ basis_v.mT


def best_factors(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, rank: int) -> Factors:
    """The factors of the best approximation of a rank, each with the root of the singular values."""
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * right[..., :rank, :]


def stack_factors(projection: DeltaProjection, factors: Factors, rank: int) -> Factors:
    """Factors (updates, in, r) and (updates, r, out) in the shapes of the projection's parameters."""
    delta_u, delta_v = factors
    shape_u, shape_v = projection.factor_shapes(rank)
    if projection.stack and projection.num_updates == 1:  # a sum, of rank levels * r, is stored level by level
        delta_u = delta_u[0].unflatten(1, (-1, rank)).transpose(0, 1)
    return delta_u.reshape(shape_u), delta_v.reshape(shape_v)


def is_of(name: str, projections: dict[str, DeltaProjection]) -> bool:
    """Whether a tensor is the base or a factor of one of `projections`."""
    module, _, part = name.rpartition(".")
    return module in projections and part in ("weight", *FACTORS)


def hub_id(repo: str | Path) -> str | None:
    """`repo` unless it is a folder, whose path means nothing elsewhere."""
    return None if Path(repo).is_dir() else str(repo)


def _write_shard(path: Path, output: Path, new: dict[str, torch.Tensor]) -> list[str]:
    """Copy a file of weights, with `new` in place of the projections in it; returns the names of its tensors."""
    with safe_open(path, framework="pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    if not new.keys() & set(names):
        shutil.copyfile(path, output)
        return names
    changed = {name: tensor for name, tensor in new.items() if f"{name.rpartition('.')[0]}.weight" in names}
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(FACTORS)}
    save_file({**kept, **changed}, output, metadata)
    shutil.copymode(path, output)
    return [*kept, *changed]
