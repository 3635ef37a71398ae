"""Takes deltas out of models, and makes them smaller: from folder to folder."""

from collections.abc import Iterable
from pathlib import Path

import torch

from ..modeling.delta_factors_delta_llava import FACTORS
from ..modeling.delta_repo_delta_llava import describe_deltas, hashes_of_base, write_delta_repo
from ..modeling.projector_delta_llava import delta_weight, pick_update
from .delta_algebra import Decomposition, decompose, decompose_product, squared_error, squared_norm
from .delta_report import DeltaReport
from .delta_sources import Projections, effective, read_projections


def extract_deltas(
    source: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> DeltaReport:
    """Write the deltas of a model as a delta repo.

    With `base`, deltas that turn that base into `source`, as well as rank `rank` can: the best approximation, by
    singular values, of what `source` (bases and deltas) has more than the bases of `base`. They take the place of
    the deltas of `base`.

    Args:
        source: folder or Hub id of a repo, or of a checkpoint in the authors' layout.
        output: folder to write; must not exist.
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
        found = read_projections(source)
        if not found.weights:
            raise ValueError(f"{found.name} holds deltas only; extract takes them out of a model.")
        pairs = {name: _cast(pair, dtype) for name, pair in found.deltas.items()}
        return _write(output, pairs, found, f"the deltas of {found.name}", _energies(found.deltas, pairs, found))

    tuned, start = read_projections(source, need_deltas=False), read_projections(base, need_deltas=False)
    _check_pair(tuned, start)
    rank = rank or tuned.rank or start.rank
    parts = {
        (name, update): decompose((effective(tuned, name, update) - start.weights[name].double()).T)
        for name, updates in start.updates.items()
        for update in updates
    }
    dtype = dtype or next(iter(tuned.weights.values())).dtype
    pairs = {name: _cast(pair, dtype) for name, pair in _best(parts, rank, start).items()}
    energies = _kept(
        {
            (name, update): (
                float(parts[name, update].values.square().sum()),
                float((_whole(parts[name, update]) - delta_weight(*pairs[name], update).double().T).square().sum()),
            )
            for name, update in parts
        }
    )
    text = f"the difference of {tuned.name} and {start.name}, rank {rank}, {energies[0]:.6f} of its energy"
    report = _write(output, pairs, start, text, energies)
    return DeltaReport(**{**vars(report), "left_out": _differing(tuned, start)})


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
        output: folder to write; must not exist.
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
    found = read_projections(source)
    parts = {key: decompose_product(*pair) for key, pair in found.pairs().items()}
    if energy is not None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy={energy}: use a share above 0, and at most 1.")
        sums = {key: _members(found, *key) for key in parts}
        rank = max(-(-part.rank_for(energy) // sums[key]) for key, part in parts.items())
        rank = min(rank, found.rank)
    assert rank is not None
    if not 1 <= rank <= found.rank:
        raise ValueError(f"rank={rank}: the deltas of {found.name} have rank {found.rank}; use 1 to {found.rank}.")
    best = _best(parts, rank, found)
    pairs = {name: _cast(pair, dtype or found.deltas[name][0].dtype) for name, pair in best.items()}
    energies = _energies(found.deltas, pairs, found)
    return _write(
        output, pairs, found, f"{found.name}, truncated to rank {rank}, {energies[0]:.6f} of its energy", energies
    )


def _refuse_existing(output: str | Path) -> None:
    if Path(output).exists() or Path(output).is_symlink():
        raise FileExistsError(f"The output {output} exists; choose another one, or remove it yourself.")


def _cast(pair: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    return pair if dtype is None else (pair[0].to(dtype), pair[1].to(dtype))


def _check_pair(tuned: Projections, start: Projections) -> None:
    for one in (tuned, start):
        if not one.weights:
            raise ValueError(f"{one.name} holds deltas only; extract compares two models.")
    if (tuned.layout, tuned.sharing, tuned.updates) != (start.layout, start.sharing, start.updates):
        raise ValueError(
            f"{tuned.name} and {start.name} have projectors of other layouts or levels, so they have no difference."
        )
    for name, weight in tuned.weights.items():
        if weight.shape != start.weights[name].shape:
            raise ValueError(
                f"{name}.weight is {tuple(weight.shape)} in {tuned.name} and {tuple(start.weights[name].shape)} in "
                f"{start.name}."
            )
        for one in (tuned, start):
            if not torch.isfinite(one.weights[name]).all():
                raise ValueError(f"{one.name}: {name}.weight holds NaN or Inf.")


def _whole(part: Decomposition) -> torch.Tensor:
    return (part.left * part.values) @ part.right


def _members(found: Projections, name: str, update: tuple[int, ...]) -> int:
    """How many updates are summed up where `update` is applied."""
    depth = {"released": 0, "paper": 2 if found.sharing == "all" else 1}[found.layout]
    return len(found.level_names) if len(update) < depth else 1


def _best(
    parts: dict[tuple[str, tuple[int, ...]], Decomposition], rank: int, like: Projections
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Deltas of a rank from decomposed updates; a sum of n updates has n times the rank to be dealt out to them."""
    if rank < 1:
        raise ValueError(f"rank={rank}: use at least 1.")
    widest = min(min(part.left.shape[0], part.right.shape[1]) for part in parts.values())
    if rank > widest:
        raise ValueError(f"rank={rank}: the bases are {widest} wide; use 1 to {widest}.")
    levels = len(like.level_names)
    leading = {"released": (), "paper": (3, levels) if like.sharing == "all" else (levels,)}[like.layout]
    deltas = {}
    for name, updates in like.updates.items():
        shape = next(part.left.shape[0] for key, part in parts.items() if key[0] == name)
        out = next(part.right.shape[1] for key, part in parts.items() if key[0] == name)
        u = torch.zeros(*leading, shape, rank, dtype=torch.float64)
        v = torch.zeros(*leading, rank, out, dtype=torch.float64)
        for update in updates:
            members = _members(like, name, update)
            left, right = parts[name, update].factors(rank * members)
            if members > 1 or u[update].dim() == 3:
                u[update] = left.unflatten(1, (members, rank)).transpose(0, 1)
                v[update] = right.unflatten(0, (members, rank))
            else:
                u[update], v[update] = left, right
        deltas[name] = (u, v)
    return deltas


def _energies(
    before: dict[str, tuple[torch.Tensor, torch.Tensor]],
    after: dict[str, tuple[torch.Tensor, torch.Tensor]],
    like: Projections,
) -> tuple[float, dict[str, float]]:
    found = {}
    for name, updates in like.updates.items():
        for update in updates:
            old, new = pick_update(*before[name], update), pick_update(*after[name], update)
            found[name, update] = squared_norm(*old), squared_error(old, new)
    return _kept(found)


def _kept(parts: dict[tuple[str, tuple[int, ...]], tuple[float, float]]) -> tuple[float, dict[str, float]]:
    """Energy kept, in all and by projection, from squared norms and squared errors."""

    def share(values: Iterable[tuple[float, float]]) -> float:
        norms, errors = (sum(column) for column in zip(*values))
        return 1 - errors / norms if norms else 1.0

    names = dict.fromkeys(name for name, _ in parts)
    by_projection = {name: share(value for key, value in parts.items() if key[0] == name) for name in names}
    return share(parts.values()), by_projection


def _differing(tuned: Projections, start: Projections) -> list[str]:
    names = tuned.others.keys() & start.others.keys()
    differing = [n for n in names if not torch.equal(tuned.others[n].load(), start.others[n].load())]
    return sorted([*differing, *(tuned.others.keys() ^ start.others.keys())])


def _write(
    output: str | Path,
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
    base: Projections,
    source: str,
    energies: tuple[float, dict[str, float]],
) -> DeltaReport:
    """A delta repo for the bases of `base`, or where that is a delta repo itself, for the same bases."""
    tensors = {f"{n}.{f}": t for n, pair in pairs.items() for f, t in zip(FACTORS, pair)}
    rank = next(iter(tensors.values())).shape[-1]
    hashes = hashes_of_base(base.weights) if base.weights else base.config["base_sha256"]
    base_name = base.name if base.weights else base.config.get("base_model_name_or_path")
    config = describe_deltas(tensors, rank, base.layout, base.sharing, hashes, base_name, source)
    config["energy"] = round(energies[0], 9)
    write_delta_repo(output, tensors, config)
    return DeltaReport(str(output), rank, config["parameters"], energies[0], energies[1])
