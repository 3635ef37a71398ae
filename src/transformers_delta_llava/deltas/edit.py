"""Extract, truncate, apply and merge deltas, from folder to folder."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

import torch

from ..conversion.names import PROJECTOR
from ..conversion.weights import Checkpoint, LazyTensor, read_checkpoint, split_shards, write_shards
from ..hub import WEIGHTS, is_published, write_code, write_config
from ..loading import load_config
from ..modeling.delta_projection_delta_llava import FACTORS, DeltaProjection, Factors, Update
from ..modeling.delta_repo_delta_llava import describe_deltas, hashes_of_base, is_base, write_delta_repo
from ..utils.errors import format_names
from ..utils.files import atomic_folder, check_output, is_free, public_name
from .algebra import Decomposition, decompose, decompose_product, squared_error, squared_norm
from .projections import Projections, read_projections


# Squared Frobenius norms by projection and update: of the update, and of what was written minus the update.
_Norms = dict[tuple[str, Update], tuple[float, float]]


@dataclass(frozen=True)
class DeltaReport:
    """What was written.

    Attributes:
        output: the folder.
        rank: of the deltas in it; 0 where there are none.
        parameters: how many numbers the deltas are.
        energy: share of the squared Frobenius norm that was kept, of all updates together; measured on what was
            written, after rounding to its dtype.
        energy_by_projection: the same by projection.
        left_out: tensors of the projector that differ between two checkpoints and are not deltas.
    """

    output: str
    rank: int
    parameters: int
    energy: float = 1.0
    energy_by_projection: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def extract_deltas(
    source: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> DeltaReport:
    """Write the deltas of a model as a delta repo.

    With `base`, deltas that turn that base into `source`, as well as rank `rank` can: the best approximation, by
    singular values, of the difference between `source` (bases and deltas) and the bases of `base`. They take the place
    of the deltas of `base`.

    Args:
        source: folder or Hub id of a repo, or of a checkpoint in the authors' layout.
        output: folder to write; must not exist, or be empty.
        base: the same, of the model that `source` was fine-tuned from.
        rank: with `base` only; the source's by default.
        dtype: of the deltas; as in the source by default.

    Raises:
        ValueError: the two do not fit each other, a rank that makes no sense, or a source that cannot be used.
        OSError: a folder that exists, or cannot be read or written.
    """
    _refuse_existing(output)
    if base is None:
        if rank is not None:
            raise ValueError("A rank needs a base: deltas of one model have the rank they have; see `truncate`.")
        model = read_projections(source)
        if not model.weights:
            raise ValueError(f"{model.name} holds deltas only; extract takes them out of a model.")
        deltas = _cast(model.deltas, dtype)
        return _write_deltas(output, deltas, model, _compare(model, deltas), f"the deltas of {model.name}")

    tuned, start = read_projections(source, need_deltas=False), read_projections(base, need_deltas=False)
    _check_pair(tuned, start)
    rank = rank or tuned.rank or start.rank
    # (in, out) in float64
    differences = {
        (name, update): (tuned.merged_weight(name, update) - start.weights[name].double()).T
        for name, update in start.updates()
    }
    deltas = _approximate({key: decompose(matrix) for key, matrix in differences.items()}, rank, start)
    deltas = _cast(deltas, dtype or next(iter(tuned.weights.values())).dtype)
    written = replace(start, deltas=deltas)
    norms: _Norms = {}
    for (name, update), matrix in differences.items():
        u, v = written.factors(name, update)
        norms[name, update] = float(matrix.square().sum()), float((matrix - u.double() @ v.double()).square().sum())
    note = f"the difference of {tuned.name} and {start.name}, rank {rank}, {_energy(norms.values()):.6f} of its energy"
    report = _write_deltas(output, deltas, start, norms, note)
    return replace(report, left_out=_differing(tuned, start))


def truncate_deltas(
    source: str | Path,
    output: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> DeltaReport:
    """Write deltas at a lower rank: the best approximation of each update, by singular values.

    Args:
        source: folder or Hub id of a delta repo, or of a model with deltas.
        output: folder to write; must not exist, or be empty.
        rank: the rank to keep, or
        energy: the share of the squared Frobenius norm to keep; the rank is the lowest at which every update (each projection,
            each level) does.
        dtype: of the deltas; as in the source by default.

    Raises:
        ValueError: neither or both of rank and energy, one that makes no sense, or a source that cannot be used.
        OSError: a folder that exists, or cannot be read or written.
    """
    _refuse_existing(output)
    if (rank is None) == (energy is None):
        raise ValueError("Give either a rank or an energy to truncate to.")
    model = read_projections(source)
    parts = {(name, update): decompose_product(*model.factors(name, update)) for name, update in model.updates()}
    if energy is not None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy={energy}: use a share above 0, and at most 1.")
        # A sum of n updates has n times the rank.
        ranks = (-(-part.rank_for(energy) // model.specs[name].num_summed(u)) for (name, u), part in parts.items())
        rank = min(max(ranks), model.rank)
    assert rank is not None
    if not 1 <= rank <= model.rank:
        raise ValueError(f"rank={rank}: the deltas of {model.name} have rank {model.rank}; use 1 to {model.rank}.")
    deltas = _cast(_approximate(parts, rank, model), dtype or next(iter(model.deltas.values()))[0].dtype)
    norms = _compare(model, deltas)
    note = f"{model.name}, truncated to rank {rank}, {_energy(norms.values()):.6f} of its energy"
    return _write_deltas(output, deltas, model, norms, note)


def apply_deltas(
    repo: str | Path,
    output: str | Path,
    deltas: str | Path,
    force: bool = False,
    max_shard_size: int | str = "2GB",
) -> DeltaReport:
    """Write a model's repo with other deltas in the place of its own; all else stays as it is, to the bit.

    Args:
        repo: folder or Hub id of a Delta-LLaVA repo.
        output: folder to write; must not exist, or be empty.
        deltas: folder or Hub id of a delta repo; cast to the model's dtype.
        force: take deltas that belong to another base.
        max_shard_size: most bytes per weight file.

    Raises:
        ValueError: deltas that do not fit, or belong to another base.
        OSError: a folder that exists, or cannot be read or written.
    """
    model, other = _read_model_and_deltas(repo, deltas, force)
    cast = {
        name: (u.to(model.weights[name].dtype), v.to(model.weights[name].dtype))
        for name, (u, v) in other.deltas.items()
    }
    note = f"These are the weights of {model.name} with the deltas of {other.name} in the place of its own."
    return _write_model(model, output, cast, {}, note, max_shard_size, other.folder)


def merge_into_base(
    repo: str | Path,
    output: str | Path,
    deltas: str | Path | None = None,
    rank: int = 0,
    force: bool = False,
    max_shard_size: int | str = "2GB",
) -> DeltaReport:
    """Write a repo whose bases have the deltas in them; all else stays as it is, to the bit.

    Added in float64 and rounded once: products in float32 differ between machines in the last bits, and with them the
    hash of the new bases.

    It has no deltas of its own (`use_delta_projection=False`), or with a `rank` new ones: `delta_v` zero, so that nothing
    is added twice, and `delta_u` as a new model has it (seed 0), so that they can be trained. Delta repos of the old
    bases are refused there.

    Args:
        repo: folder or Hub id of a Delta-LLaVA repo.
        output: folder to write; must not exist, or be empty.
        deltas: folder or Hub id of a delta repo to merge; by default the model's own.
        rank: of the new deltas; 0 for none.
        force: take deltas that belong to another base.
        max_shard_size: most bytes per weight file.

    Raises:
        ValueError: deltas that do not fit or belong to another base, sums that are not finite, or levels that share a
            base, which has no room for an update per level.
        OSError: a folder that exists, or cannot be read or written.
    """
    if deltas is None:
        model = other = read_projections(repo)
        if not model.weights:
            raise ValueError(
                f"{model.name} holds deltas only; merge them into a model, and pass them as `deltas=...`."
            )
    else:
        model, other = _read_model_and_deltas(repo, deltas, force)
    if shared := sorted(name for name, spec in model.specs.items() if len(spec.updates) > 1):
        raise ValueError(
            f"{model.name}: {format_names(shared)} is one base for several levels (projector_layout='paper'), each with a "
            "delta of its own: they cannot be merged on disk; merge_deltas() of a loaded model keeps a sum for each."
        )
    width = min(min(weight.shape) for weight in model.weights.values())
    if not 0 <= rank <= width:
        raise ValueError(f"rank={rank}: use 0 for a model without deltas, or 1 to {width}.")
    weights, new = {}, {}
    for name, update in model.updates():
        weight = model.weights[name]
        weights[name] = other.merged_weight(name, update, weight).to(weight.dtype)
        if rank:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                u, v = (DeltaProjection(model.specs[name], rank).get_parameter(factor).detach() for factor in FACTORS)
            new[name] = u.to(weight.dtype), torch.zeros_like(v, dtype=weight.dtype)
    note = f"These are the weights of {model.name} with the deltas of {other.name} merged into their bases."
    return _write_model(model, output, new, weights, note, max_shard_size, other.folder)


def _refuse_existing(output: str | Path) -> None:
    if not is_free(Path(output)):
        raise FileExistsError(f"The output {output} exists; choose another one, or remove it yourself.")


def _cast(deltas: dict[str, Factors], dtype: torch.dtype | None) -> dict[str, Factors]:
    return {name: (u.to(dtype or u.dtype), v.to(dtype or v.dtype)) for name, (u, v) in deltas.items()}


def _check_pair(tuned: Projections, start: Projections) -> None:
    """Refuse two sources that have no difference."""
    for model in (tuned, start):
        if not model.weights:
            raise ValueError(f"{model.name} holds deltas only; extract compares two models.")
    if (tuned.layout, tuned.sharing, tuned.specs.keys()) != (start.layout, start.sharing, start.specs.keys()):
        raise ValueError(
            f"{tuned.name} and {start.name} have projectors of other layouts or levels, so they have no difference."
        )
    for name, weight in tuned.weights.items():
        if weight.shape != start.weights[name].shape:
            raise ValueError(
                f"{name}.weight is {tuple(weight.shape)} in {tuned.name} and {tuple(start.weights[name].shape)} in "
                f"{start.name}."
            )
        for model in (tuned, start):
            if not torch.isfinite(model.weights[name]).all():
                raise ValueError(f"{model.name}: {name}.weight holds NaN or Inf.")


def _differing(tuned: Projections, start: Projections) -> list[str]:
    """Other tensors of the projector that are in one only, or differ."""
    names = tuned.others.keys() & start.others.keys()
    differing = [n for n in names if not torch.equal(tuned.others[n].load(), start.others[n].load())]
    return sorted([*differing, *(tuned.others.keys() ^ start.others.keys())])


def _approximate(parts: dict[tuple[str, Update], Decomposition], rank: int, like: Projections) -> dict[str, Factors]:
    """The best deltas of a rank, in float64; a sum of n updates has n times the rank to be shared out among them."""
    widest = min(min(part.left.shape[0], part.right.shape[1]) for part in parts.values())
    if not 1 <= rank <= widest:
        raise ValueError(f"rank={rank}: the bases are {widest} wide; use 1 to {widest}.")
    deltas = {}
    for name, spec in like.specs.items():
        u, v = (torch.zeros(shape, dtype=torch.float64) for shape in spec.factor_shapes(rank))
        for update in spec.updates:
            left, right = parts[name, update].factors(rank * spec.num_summed(update))
            u[update] = left.unflatten(1, (-1, rank)).transpose(0, 1).reshape(u[update].shape)
            v[update] = right.reshape(v[update].shape)
        deltas[name] = (u, v)
    return deltas


def _compare(model: Projections, deltas: dict[str, Factors]) -> _Norms:
    """`deltas` beside those of `model`."""
    after, norms = replace(model, deltas=deltas), {}
    for name, update in model.updates():
        factors = model.factors(name, update)
        norms[name, update] = squared_norm(*factors), squared_error(factors, after.factors(name, update))
    return norms


def _energy(norms: Iterable[tuple[float, float]]) -> float:
    """The share of the squared norm that was kept."""
    total, lost = (sum(column) for column in zip(*norms))
    return 1 - lost / total if total else 1.0


def _write_deltas(
    output: str | Path, deltas: dict[str, Factors], base: Projections, norms: _Norms, source: str
) -> DeltaReport:
    """A delta repo for the bases of `base`, or where that is a delta repo itself, for the same bases."""
    energy = _energy(norms.values())
    by_projection = {name: _energy(n for key, n in norms.items() if key[0] == name) for name in deltas}
    tensors = {f"{name}.{f}": factor for name, factors in deltas.items() for f, factor in zip(FACTORS, factors)}
    rank = next(iter(tensors.values())).shape[-1]
    hashes = hashes_of_base(base.weights) if base.weights else base.config["base_sha256"]
    base_name = base.name if base.weights else base.config.get("base_model_name_or_path")
    config = describe_deltas(tensors, rank, base.layout, base.sharing, hashes, base_name, source)
    config["energy"] = round(energy, 9)
    write_delta_repo(output, tensors, config)
    return DeltaReport(str(output), rank, config["parameters"], energy, by_projection)


def _read_model_and_deltas(repo: str | Path, deltas: str | Path, force: bool) -> tuple[Projections, Projections]:
    model, other = read_projections(repo, need_deltas=False), read_projections(deltas)
    if not model.weights or not other.config:
        raise ValueError(f"Expected a model and a delta repo, but got {model.name} and {other.name}.")
    if (model.layout, model.sharing) != (other.layout, other.sharing):
        raise ValueError(
            f"{other.name} has deltas for projector_layout={other.layout!r} and delta_sharing={other.sharing!r}, but "
            f"{model.name} has {model.layout!r} and {model.sharing!r}."
        )
    for name, spec in model.specs.items():
        if spec != other.specs[name]:
            u, v = (tuple(factor.shape) for factor in other.deltas[name])
            raise ValueError(
                f"{other.name}: {name}.delta_u is {u} and delta_v {v}, which does not fit the base "
                f"{(spec.out_features, spec.in_features)} and {len(model.levels)} levels of {model.name}."
            )
    if not force and not is_base(model.weights, other.config["base_sha256"]):
        base = other.config.get("base_model_name_or_path") or "unnamed"
        raise ValueError(
            f"{other.name} belongs to another base ({base}) than {model.name}; pass `force=True` to take it nevertheless."
        )
    return model, other


def _write_model(
    model: Projections,
    output: str | Path,
    deltas: dict[str, Factors],
    weights: dict[str, torch.Tensor],
    note: str,
    max_shard_size: int | str,
    deltas_folder: Path,
) -> DeltaReport:
    """The repo of `model` with other deltas (none: without) and, where given, other bases."""
    output = Path(output)
    _refuse_existing(output)
    check_output(output, [model.folder, deltas_folder], overwrite=False)
    config = load_config(model.folder)
    checkpoint = read_checkpoint(model.folder)
    new = {f"{PROJECTOR}{name}.weight": weight for name, weight in weights.items()}
    new |= {f"{PROJECTOR}{name}.{f}": factor for name, pair in deltas.items() for f, factor in zip(FACTORS, pair)}
    rank = next(iter(deltas.values()))[0].shape[-1] if deltas else 0
    tensors = _replace_tensors(checkpoint, new)
    shards = split_shards(tensors, max_shard_size)
    config.use_delta_projection = bool(deltas)
    config.delta_rank = rank or config.delta_rank
    with atomic_folder(output) as tmp_dir:
        for file in sorted(model.folder.iterdir()):
            if file.is_file() and is_published(file.name) and not fnmatch(file.name, WEIGHTS):
                shutil.copyfile(file, tmp_dir / file.name)
        write_code(tmp_dir)
        write_config(config, tmp_dir)
        write_shards(tensors, shards, tmp_dir)
        card = tmp_dir / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {public_name(str(output))}\n"
        card.write_text(f"{text.rstrip()}\n\n## Deltas\n\n{note}\n", encoding="utf-8")
    return DeltaReport(str(output), rank, sum(u.numel() + v.numel() for u, v in deltas.values()))


def _replace_tensors(checkpoint: Checkpoint, new: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    """The tensors of a repo in their order, some with other values, deltas that are not in `new` left out."""
    old = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not (name.startswith(PROJECTOR) and name.endswith((".delta_u", ".delta_v")))
    }
    lazy = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in new.items()}  # type: ignore[misc]
    return {**old, **lazy}
