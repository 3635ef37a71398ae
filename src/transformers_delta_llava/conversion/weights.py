"""Reads, writes and verifies weights tensor by tensor, and runs no code that a checkpoint may carry."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from ..modeling.delta_repo_delta_llava import write_tensors
from ..utils.errors import DeltaLlavaError, explain_errors, format_names
from ..utils.files import read_json, write_json
from .pickles import check_archive, is_archive, open_pickle


# In the order in which transformers looks for weights; then what training frameworks write when they consolidate.
_WEIGHT_FILES = (
    ("model", ".safetensors"),
    ("pytorch_model", ".bin"),
    ("pytorch_model_fsdp", ".bin"),
    ("pytorch_model", ".pt"),
    ("model", ".pt"),
    ("consolidated", ".pt"),
)
# Supported dtypes, by their name in safetensors.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed; `load` reads it anew at each call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes."""
        return self.numel() * self.dtype.itemsize

    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def map(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LazyTensor":
        """The tensor that `function` returns, of `shape` and `dtype` (by default unchanged); applied when it is read."""
        shape = self.shape if shape is None else shape
        return LazyTensor(shape, dtype or self.dtype, lambda: function(self.load()))

    def reshape(self, shape: tuple[int, ...]) -> "LazyTensor":
        """The same values in another shape."""
        return self.map(lambda tensor: tensor.reshape(shape), shape=shape)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, and the files that were read: the weights and their index."""

    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open the weights of `folder`: safetensors or pickled (`.bin`), in one file or in shards with an index.

    Only headers are read; values stay on disk until a tensor's `load`.

    Raises:
        DeltaLlavaError: no weights, incomplete shards, a tensor that is in two shards or is empty, an index that
            disagrees with its shards, a damaged file, or a pickle that holds anything but tensors.
    """
    files = _find_weights(folder)
    if not files:
        raise DeltaLlavaError(_describe_missing_weights(folder))
    index = files[0] if files[0].suffix == ".json" else None
    weight_map = _read_index(index) if index else {}
    if index:
        files = [folder / name for name in sorted(set(weight_map.values()))]
    elif len(files) > 1 or "-of-" in files[0].name:
        _check_complete(files)
    tensors: dict[str, LazyTensor] = {}
    origin: dict[str, str] = {}
    duplicates: list[str] = []
    for file in files:
        contents = open_weights(file)
        duplicates += [f"{name} (in {origin[name]} and {file.name})" for name in contents if name in origin]
        tensors.update(contents)
        origin.update(dict.fromkeys(contents, file.name))
    if duplicates:
        raise DeltaLlavaError(f"The shards of {folder.name} hold tensors twice: {format_names(duplicates)}.")
    if index and (wrong := [name for name, _ in weight_map.items() ^ origin.items()]):
        raise DeltaLlavaError(f"{index.name} and the shards disagree about {format_names(set(wrong))}.")
    return Checkpoint(tensors, (*files, *([index] if index else [])))


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds weights under a name that `read_checkpoint` looks for."""
    return bool(_find_weights(folder))


def open_weights(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, safetensors or pickled; raises as `read_checkpoint` does."""
    if not file.is_file():  # a pipe would never end
        raise DeltaLlavaError(f"{file.name} is missing, or not a regular file.")
    tensors = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
    if empty := [name for name, tensor in tensors.items() if tensor.num_bytes == 0]:
        raise DeltaLlavaError(
            f"Empty tensors, as DeepSpeed ZeRO-3 leaves behind without consolidation: {format_names(empty)}; save the "
            "checkpoint with stage3_gather_16bit_weights_on_model_save, or consolidate it with zero_to_fp32.py."
        )
    # DistributedDataParallel and DeepSpeed put their own level before every name.
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _find_weights(folder: Path) -> list[Path]:
    """The first of these that the folder has: a file of all weights, an index, or shards; empty where it has none."""
    for stem, suffix in _WEIGHT_FILES:
        for file in (folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"):
            if file.is_file():
                return [file]
        if shards := sorted(folder.glob(f"{stem}-*-of-*{suffix}")):
            return shards
    return []


def _describe_missing_weights(folder: Path) -> str:
    if any(folder.glob("global_step*")) or any(folder.rglob("*_model_states.pt")):
        return (
            f"{folder.name} holds DeepSpeed's own files, with parts of tensors; consolidate them with "
            "zero_to_fp32.py into a pytorch_model.bin."
        )
    return (
        f"No weights in {folder.name}: expected model.safetensors, pytorch_model.bin or .pt, their shards, "
        "mm_projector.bin, or adapter_model.safetensors or .bin."
    )


def _read_index(index: Path) -> dict[str, str]:
    """Which tensor is in which file; DeltaLlavaError unless these are files beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DeltaLlavaError(f"{index.name} has no weight_map.")
    names = weight_map.values()
    outside = {str(name) for name in names if not isinstance(name, str) or Path(name).name != name or len(name) > 255}
    if outside:
        raise DeltaLlavaError(f"{index.name} names files outside its own folder: {format_names(outside)}.")
    if missing := {name for name in names if not (index.parent / name).is_file()}:
        raise DeltaLlavaError(f"{index.name} names missing files: {format_names(missing)}.")
    return weight_map


def _check_complete(shards: list[Path]) -> None:
    """Refuse shards that are not 1-of-n to n-of-n."""
    matches = [re.search(r"-(\d{1,9})-of-(\d{1,9})\.", shard.name) for shard in shards]
    numbers = [(int(match[1]), int(match[2])) for match in matches if match]
    if numbers != [(i, len(shards)) for i in range(1, len(shards) + 1)]:
        raise DeltaLlavaError(
            f"Shards are missing: {format_names(shard.name for shard in shards)} is not a complete set."
        )


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    try:
        handle = safe_open(file, framework="pt")
        entries = {name: handle.get_slice(name) for name in handle.keys()}
        types = {name: entry.get_dtype() for name, entry in entries.items()}
        shapes = {name: tuple(entry.get_shape()) for name, entry in entries.items()}
    except SafetensorError as error:
        raise DeltaLlavaError(f"{file.name} is not a readable safetensors file: {error}.") from error
    _refuse_dtypes(file, {name: dtype for name, dtype in types.items() if dtype not in _DTYPES})
    return {n: LazyTensor(shapes[n], _DTYPES[types[n]], partial(handle.get_tensor, n)) for n in entries}


def _refuse_dtypes(file: Path, unsupported: Mapping[str, object]) -> None:
    if unsupported:
        names = format_names(f"{name} ({dtype})" for name, dtype in unsupported.items())
        raise DeltaLlavaError(f"{file.name} holds tensors of unsupported dtypes: {names}.")


def _open_pickle(file: Path) -> dict[str, LazyTensor]:
    mapped = is_archive(file)
    contents = open_pickle(file) if mapped else _read_old_pickle(file)
    _refuse_dtypes(file, {n: value.dtype for n, value in contents.items() if value.dtype not in _DTYPES.values()})
    return {
        name: LazyTensor(
            tuple(value.shape), value.dtype, value.detach if mapped else partial(_load_old_pickle, file, name)
        )
        for name, value in contents.items()
    }


# Files older than PyTorch 1.6 cannot be mapped. One at a time is in memory, since tensors are mostly read file by file.
_read_old_pickle = lru_cache(maxsize=1)(open_pickle)


def _load_old_pickle(file: Path, name: str) -> torch.Tensor:
    return _read_old_pickle(file)[name].detach()


def verify_archives(files: Iterable[Path]) -> None:
    """Read all of the `.bin` files among `files` and compare it with the checksums in them; PyTorch does not.

    Raises:
        DeltaLlavaError: naming the first file that is damaged.
    """
    for file in files:
        if file.suffix in (".bin", ".pt") and is_archive(file):
            check_archive(file, values=True)


# Called with the bytes written so far and the bytes in all.
Progress = Callable[[int, int], None]


def split_shards(tensors: Mapping[str, LazyTensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """Names of the tensors of each weight file, with the file names that transformers uses.

    Args:
        tensors: what to write, in their order.
        max_shard_size: most bytes of tensors per file, as a number or as `2GB`; a larger tensor gets its own file.

    Raises:
        DeltaLlavaError: `max_shard_size` is not a size.
    """
    with explain_errors(f"max_shard_size={max_shard_size!r} is not a size such as 2GB or 500MB"):
        return split_state_dict_into_shards_factory(
            tensors,  # type: ignore[arg-type]
            get_storage_size=lambda tensor: tensor.num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        ).filename_to_tensors


def write_shards(
    tensors: Mapping[str, LazyTensor], shards: Mapping[str, list[str]], folder: Path, progress: Progress | None = None
) -> None:
    """Write `tensors` into the files that `split_shards` names, and an index where there are several.

    Raises:
        DeltaLlavaError: naming a tensor that holds NaN or Inf.
        OSError: a file cannot be written.
    """
    total, done = sum(tensor.num_bytes for tensor in tensors.values()), 0
    for file_name, names in shards.items():
        contents: dict[str, torch.Tensor] = {}
        for name in names:
            contents[name] = _separate(tensors[name].load(), contents.values())
            _refuse_non_finite(name, contents[name])
            done += tensors[name].num_bytes
            if progress is not None:
                progress(done, total)
        write_tensors(contents, folder / file_name, file_name)
    if len(shards) > 1:
        parameters = sum(tensor.numel() for tensor in tensors.values())
        weight_map = {name: file_name for file_name, names in shards.items() for name in names}
        index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
        write_json(index, folder / "model.safetensors.index.json")


def verify_shards(tensors: Mapping[str, LazyTensor], folder: Path, progress: Progress | None = None) -> None:
    """Read back what `write_shards` wrote, and compare every tensor with its source, read again, bit by bit.

    Raises:
        DeltaLlavaError: naming the first tensor that differs.
    """
    written = read_checkpoint(folder).tensors
    if written.keys() != tensors.keys():
        raise DeltaLlavaError(
            f"Verification failed: the files differ in {format_names(written.keys() ^ tensors.keys())}."
        )
    total, done = sum(tensor.num_bytes for tensor in tensors.values()), 0
    for name, tensor in tensors.items():
        if not same_bits(tensor.load(), written[name].load()):
            raise DeltaLlavaError(f"Verification failed: {name} differs from its source.")
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


def _separate(tensor: torch.Tensor, others: Iterable[torch.Tensor]) -> torch.Tensor:
    """`tensor`, contiguous and without memory that it shares with `others`; copied only where it must be."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    if whole and all(tensor.data_ptr() != other.data_ptr() for other in others):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _refuse_non_finite(name: str, tensor: torch.Tensor) -> None:
    # The extremes are one pass without a copy, and NaN goes through to them.
    if tensor.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise DeltaLlavaError(
            f"{name} holds NaN or Inf: a run that diverged, a damaged file, or a cast to a dtype of too small a range."
        )
