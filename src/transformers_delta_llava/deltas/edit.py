"""Extract, truncate, apply and merge deltas, from folder to folder."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..conversion.checkpoint import Checkpoint, LazyTensor, parse_size, read_checkpoint, write_shards
from ..conversion.export import read_repo_config
from ..hub.repo_files import write_code, write_config
from ..modeling.delta_projection_delta_llava import (
    FACTORS,
    DeltaProjection,
    Factors,
    ProjectionSpec,
    delta_weight,
    pick_update,
)
from ..modeling.delta_repo_delta_llava import describe_deltas, hashes_of_base, is_base, write_delta_repo
from ..utils.errors import format_names
from ..utils.files import atomic_folder, check_output, public_name
from .algebra import Decomposition, decompose, decompose_product, squared_error, squared_norm
from .projections import PROJECTOR, Projections, effective, read_projections


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
        left_out: tensors of the projector that differ between two checkpoints and are no deltas.
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
        for name, spec in start.specs.items()
        for update in spec.updates
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
        rank = max(
            -(-part.rank_for(energy) // found.specs[name].num_summed(update)) for (name, update), part in parts.items()
        )
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
        for one in (tuned, start):
            if not torch.isfinite(one.weights[name]).all():
                raise ValueError(f"{one.name}: {name}.weight holds NaN or Inf.")


def _whole(part: Decomposition) -> torch.Tensor:
    return (part.left * part.values) @ part.right


def _best(
    parts: dict[tuple[str, tuple[int, ...]], Decomposition], rank: int, like: Projections
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Deltas of a rank from decomposed updates; a sum of n updates has n times the rank to be dealt out to them."""
    if rank < 1:
        raise ValueError(f"rank={rank}: use at least 1.")
    widest = min(min(part.left.shape[0], part.right.shape[1]) for part in parts.values())
    if rank > widest:
        raise ValueError(f"rank={rank}: the bases are {widest} wide; use 1 to {widest}.")
    deltas = {}
    for name, spec in like.specs.items():
        u, v = (torch.zeros(shape, dtype=torch.float64) for shape in spec.factor_shapes(rank))
        for update in spec.updates:
            members = spec.num_summed(update)
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
    for name, spec in like.specs.items():
        for update in spec.updates:
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


# What a repo has besides its weights; anything else in the folder (checkpoints, logs of the trainer) stays behind.
_COPIED = {".json", ".py", ".jinja", ".md", ".txt", ".model"}
_NOT_COPIED = {"trainer_state.json", "train_results.json", "all_results.json", "model.safetensors.index.json"}


def apply_deltas(
    repo: str | Path, deltas: str | Path, output: str | Path, force: bool = False, max_shard_size: int | str = "2GB"
) -> DeltaReport:
    """Write a repo with other deltas in it; the bases and all else stay as they are, to the bit.

    Args:
        repo: folder or Hub id of a Delta-LLaVA repo.
        deltas: folder or Hub id of a delta repo.
        output: folder to write; must not exist.
        force: take deltas that belong to another base.
        max_shard_size: most bytes per weight file.

    Raises:
        ValueError: deltas that do not fit, or belong to another base.
        OSError: a folder that exists, or cannot be read or written.
    """
    model, found = _model_and_deltas(repo, deltas, force)
    tensors = {n: (u.to(model.weights[n].dtype), v.to(model.weights[n].dtype)) for n, (u, v) in found.deltas.items()}
    note = f"These are the weights of {model.name} with the deltas of {found.name} in the place of its own."
    return _write_model(model, output, tensors, {}, found.rank, note, max_shard_size, [found.folder])


def merge_deltas(
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
        output: folder to write; must not exist.
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
        model = found = read_projections(repo)
        if not model.weights:
            raise ValueError(
                f"{model.name} holds deltas only; merge them into a model: merge REPO OUTPUT --deltas ..."
            )
    else:
        model, found = _model_and_deltas(repo, deltas, force)
    shared = sorted(name for name, spec in model.specs.items() if len(spec.updates) > 1)
    if shared:
        raise ValueError(
            f"{model.name}: {format_names(shared)} is one base for several levels (projector_layout='paper'), each with a "
            "delta of its own: they cannot be merged on disk; merge_deltas() of a loaded model keeps a sum for each."
        )
    width = min(min(weight.shape) for weight in model.weights.values())
    if not 0 <= rank <= width:
        raise ValueError(f"rank={rank}: use 0 for a model without deltas, or 1 to {width}.")
    weights = {
        name: effective(found, name, found.specs[name].updates[0], weight).to(weight.dtype)
        for name, weight in model.weights.items()
    }
    new = {name: _new_deltas(model.specs[name], rank, weight.dtype) for name, weight in weights.items()}
    note = f"These are the weights of {model.name} with the deltas of {found.name} merged into their bases."
    return _write_model(model, output, new if rank else {}, weights, rank, note, max_shard_size, [found.folder])


def _model_and_deltas(repo: str | Path, deltas: str | Path, force: bool) -> tuple[Projections, Projections]:
    model, found = read_projections(repo, need_deltas=False), read_projections(deltas)
    if not model.weights or not found.config:
        raise ValueError(f"Expected a model and a delta repo, but got {model.name} and {found.name}.")
    if (model.layout, model.sharing) != (found.layout, found.sharing):
        raise ValueError(
            f"{found.name} has deltas for projector_layout={found.layout!r} and delta_sharing={found.sharing!r}, but "
            f"{model.name} has {model.layout!r} and {model.sharing!r}."
        )
    for name, (u, v) in found.deltas.items():
        out, width = model.weights[name].shape
        if (u.shape[-2], v.shape[-1]) != (width, out) or len(found.level_names) != len(model.level_names):
            raise ValueError(
                f"{found.name}: {name}.delta_u is {tuple(u.shape)} and delta_v {tuple(v.shape)}, which does not fit "
                f"the base {(out, width)} and {len(model.level_names)} levels of {model.name}."
            )
    if not force and not is_base(model.weights, found.config["base_sha256"]):
        raise ValueError(
            f"{found.name} belongs to another base ({found.config.get('base_model_name_or_path') or 'unnamed'}) than {model.name}; "
            "pass `force=True` to take it nevertheless."
        )
    return model, found


def _new_deltas(spec: ProjectionSpec, rank: int, dtype: torch.dtype) -> Factors:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new = DeltaProjection(spec, max(rank, 1))
    u, v = new.get_parameter("delta_u").detach(), new.get_parameter("delta_v").detach()
    return u.to(dtype), torch.zeros_like(v, dtype=dtype)


def _write_model(
    model: Projections,
    output: str | Path,
    deltas: dict[str, tuple[torch.Tensor, torch.Tensor]],
    weights: dict[str, torch.Tensor],
    rank: int,
    note: str,
    max_shard_size: int | str,
    inputs: list[Path],
) -> DeltaReport:
    """The repo of `model` with other deltas (none: without) and, where given, other bases."""
    output, size = Path(output), parse_size(max_shard_size)
    check_output(output, [model.folder, *inputs], overwrite=False)
    config = read_repo_config(model.folder)
    checkpoint = read_checkpoint(model.folder)
    new = {f"{PROJECTOR}{name}.weight": weight for name, weight in weights.items()}
    for name, (u, v) in deltas.items():
        new |= {f"{PROJECTOR}{name}.delta_u": u, f"{PROJECTOR}{name}.delta_v": v}
    config.use_delta_projection = bool(deltas)
    config.delta_rank = rank or config.delta_rank
    with atomic_folder(output) as growing:
        _copy_files(model.folder, growing, checkpoint)
        write_code(growing)
        write_config(config, growing)
        write_shards(_replaced(checkpoint, new), growing, size)
        card = growing / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {public_name(str(output))}\n"
        card.write_text(f"{text.rstrip()}\n\n## Deltas\n\n{note}\n", encoding="utf-8")
    return DeltaReport(str(output), rank, sum(u.numel() + v.numel() for u, v in deltas.values()))


def _copy_files(source: Path, target: Path, checkpoint: Checkpoint) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _COPIED and file.name not in _NOT_COPIED and file not in checkpoint.files:
            shutil.copyfile(file, target / file.name)


def _replaced(checkpoint: Checkpoint, new: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    """The tensors of a repo in their order, some with other values, deltas that are not in `new` left out."""
    old = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not (name.startswith(PROJECTOR) and name.endswith((".delta_u", ".delta_v")))
    }
    lazy = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in new.items()}  # type: ignore[misc]
    return {**old, **lazy}
