"""Puts deltas into models, beside their bases or into them: from folder to folder."""

import shutil
from pathlib import Path

import torch

from ..conversion.checkpoint_reader import Checkpoint, LazyTensor, read_checkpoint
from ..conversion.errors import listed
from ..conversion.export import read_repo_config
from ..conversion.hub_repo import write_config
from ..conversion.repo_code import write_code
from ..conversion.shard_writer import parse_size, write_shards
from ..modeling.delta_repo_delta_llava import is_base
from ..modeling.projector_delta_llava import DeltaProjection
from ..utils.hub import public_name
from ..utils.output_folder import atomic_folder, check_output
from .delta_report import DeltaReport
from .delta_sources import PROJECTOR, Projections, effective, read_projections


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
    shared = sorted(name for name, updates in model.updates.items() if len(updates) > 1)
    if shared:
        raise ValueError(
            f"{model.name}: {listed(shared)} is one base for several levels (projector_layout='paper'), each with a "
            "delta of its own: they cannot be merged on disk; merge_deltas() of a loaded model keeps a sum for each."
        )
    width = min(min(weight.shape) for weight in model.weights.values())
    if not 0 <= rank <= width:
        raise ValueError(f"rank={rank}: use 0 for a model without deltas, or 1 to {width}.")
    weights = {
        name: effective(found, name, found.updates[name][0], weight).to(weight.dtype)
        for name, weight in model.weights.items()
    }
    new = {name: _new_deltas(weight, found.deltas[name][0].shape[:-2], rank) for name, weight in weights.items()}
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
            "pass --force (force=True) to take it nevertheless."
        )
    return model, found


def _new_deltas(weight: torch.Tensor, leading: torch.Size, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new = DeltaProjection(weight.shape[1], weight.shape[0], max(rank, 1), updates=tuple(leading))
    u, v = new.get_parameter("delta_u").detach(), new.get_parameter("delta_v").detach()
    return u.to(weight.dtype), torch.zeros_like(v, dtype=weight.dtype)


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
