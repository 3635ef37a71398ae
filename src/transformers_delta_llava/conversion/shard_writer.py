"""Writes tensors into safetensors files of a limited size, one file in memory at a time."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..utils.files import write_json
from .checkpoint_reader import LazyTensor, read_checkpoint
from .errors import ConversionError, listed


# Called with the bytes written so far and the bytes in all.
Progress = Callable[[int, int], None]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as `2GB` or `500MB` (decimal), `2GiB` (binary), or a plain number.

    Raises:
        ConversionError: if it is none of these, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    value = int(float(match[1]) * unit) if match and unit else 0
    if value < 1:
        raise ConversionError(f"max_shard_size={size!r} is not a size; use for instance 2GB or 500MB.")
    return value


def write_shards(
    tensors: Mapping[str, LazyTensor], folder: Path, max_shard_size: int, progress: Progress | None = None
) -> list[str]:
    """Write `tensors`, in their order, as transformers names and indexes them.

    Args:
        tensors: what to write.
        folder: an existing folder.
        max_shard_size: most bytes of tensors per file; a tensor that is larger gets a file of its own.
        progress: see `Progress`.

    Returns:
        The names of the weight files.

    Raises:
        ConversionError: naming a tensor that holds NaN or Inf.
        OSError: a file cannot be written.
    """
    shards = _split(tensors, max_shard_size)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total, done = sum(tensor.num_bytes for tensor in tensors.values()), 0
    for file_name, shard in zip(names, shards):
        contents: dict[str, torch.Tensor] = {}
        for name in shard:
            contents[name] = _apart(tensors[name].load(), contents.values())
            _refuse_non_finite(name, contents[name])
            done += tensors[name].num_bytes
            if progress is not None:
                progress(done, total)
        _save(contents, folder / file_name)
    if len(shards) > 1:
        _write_index(folder, {name: file for file, shard in zip(names, shards) for name in shard}, tensors, total)
    return names


def verify_shards(tensors: Mapping[str, LazyTensor], folder: Path, progress: Progress | None = None) -> None:
    """Read back what `write_shards` wrote, and compare every tensor with its source, made anew, bit by bit.

    Raises:
        ConversionError: naming the first tensor that differs.
    """
    written = read_checkpoint(folder).tensors
    if written.keys() != tensors.keys():
        raise ConversionError(f"Verification failed: the files differ in {listed(written.keys() ^ tensors.keys())}.")
    total, done = sum(tensor.num_bytes for tensor in tensors.values()), 0
    for name, tensor in tensors.items():
        if not same_bits(tensor.load(), written[name].load()):
            raise ConversionError(f"Verification failed: {name} is not on the disk as it was written.")
        done += tensor.num_bytes
        if progress is not None:
            progress(done, total)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit; zeros of different sign differ."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
    )


def _apart(tensor: torch.Tensor, others: Iterable[torch.Tensor]) -> torch.Tensor:
    """`tensor`, contiguous, sharing no memory with `others`. What is mapped from a file stays so: it is written uncopied."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    if whole and all(tensor.data_ptr() != other.data_ptr() for other in others):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _refuse_non_finite(name: str, tensor: torch.Tensor) -> None:
    # The extremes are one pass without a copy, and NaN goes through to them.
    if tensor.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise ConversionError(
            f"{name} holds NaN or Inf: a run that diverged, a damaged file, or a cast to a dtype of too small a range."
        )


def _save(contents: dict[str, torch.Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(contents, path, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors wraps what the file system says
        raise OSError(f"{path.name} cannot be written: {error}") from error
    path.chmod(mode)  # some safetensors versions let only the owner read


def _split(tensors: Mapping[str, LazyTensor], max_shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    return shards


def _write_index(folder: Path, weight_map: dict[str, str], tensors: Mapping[str, LazyTensor], total: int) -> None:
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    write_json(index, folder / "model.safetensors.index.json")
