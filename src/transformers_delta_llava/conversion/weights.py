"""Weights on disk: opened lazily, written in shards, compared bit by bit. Pickles are read as tensors only, never run."""

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import DeltaLlavaError, format_names, one_line, read_json, write_json


# In the order in which transformers looks for weights; then what FSDP, DeepSpeed and others write when they consolidate.
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model_fsdp.bin",
    "pytorch_model.pt",
    "model.pt",
    "consolidated.pt",
)
# By their names in safetensors.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Keys under which some frameworks wrap the weights.
_WRAPPERS = ("module", "model", "state_dict")
# Called with the bytes done so far, and the bytes in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that each call of `load` reads from disk."""

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
        """The result of `function`, of `shape` and `dtype` (by default unchanged), which is called when it is loaded."""
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
    """Open the weights of `folder`, in one file or in shards. Only headers are read.

    Raises:
        DeltaLlavaError: no weights, incomplete shards, a tensor that is in two shards or is empty, an index that
            disagrees with its shards, or a file that holds anything but tensors.
    """
    files = _find_weights(folder)
    if not files:
        raise DeltaLlavaError(
            f"{folder.name} has no weights: none of {', '.join(WEIGHT_FILES)}, nor shards of them; consolidate "
            "DeepSpeed's own files with zero_to_fp32.py"
        )
    index = files[0] if files[0].suffix == ".json" else None
    weight_map = read_json(index)["weight_map"] if index else {}
    if index:
        files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        contents = open_weights(file)
        if twice := tensors.keys() & contents.keys():
            raise DeltaLlavaError(f"{file.name} repeats tensors of another shard: {format_names(twice)}")
        tensors |= contents
    if index and (wrong := weight_map.keys() ^ tensors.keys()):
        raise DeltaLlavaError(f"{index.name} and the shards disagree about {format_names(wrong)}")
    return Checkpoint(tensors, (*files, *([index] if index else [])))


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds weights under a name that `read_checkpoint` looks for."""
    return bool(_find_weights(folder))


def _find_weights(folder: Path) -> list[Path]:
    """The first of these that the folder has: a file of all weights, an index, or shards; empty where it has none."""
    for name in WEIGHT_FILES:
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.is_file():
                return [file]
        stem, suffix = name.rsplit(".", 1)
        if shards := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            if len(shards) != int(re.findall(r"-of-(\d+)", shards[0].name)[0]):
                raise DeltaLlavaError(
                    f"shards are missing: {folder.name} has only {format_names(s.name for s in shards)}"
                )
            return shards
    return []


def open_weights(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, or of one that `torch.save` wrote, without the prefix of DDP and DeepSpeed.

    Raises:
        DeltaLlavaError: the file is damaged, holds anything but tensors, or holds an empty one.
        OSError: it cannot be opened.
    """
    try:
        tensors = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
    except OSError:
        raise
    except Exception as error:  # of many kinds, and none of them names the file
        raise DeltaLlavaError(f"{file.name} cannot be read as tensors: {one_line(error, 300)}") from error
    if empty := [name for name, tensor in tensors.items() if not tensor.numel()]:
        raise DeltaLlavaError(
            f"{file.name} holds empty tensors, as DeepSpeed ZeRO-3 leaves without consolidation: {format_names(empty)}; save "
            "with stage3_gather_16bit_weights_on_model_save, or consolidate with zero_to_fp32.py"
        )
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    handle = safe_open(file, framework="pt")
    slices = {name: handle.get_slice(name) for name in handle.keys()}
    return {
        name: LazyTensor(tuple(s.get_shape()), _DTYPES[s.get_dtype()], partial(handle.get_tensor, name))
        for name, s in slices.items()
    }


def _open_pickle(file: Path) -> dict[str, LazyTensor]:
    contents = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    contents = next((contents[key] for key in _WRAPPERS if key in contents), contents)
    if others := [str(name) for name, value in contents.items() if not isinstance(value, torch.Tensor)]:
        raise DeltaLlavaError(f"not tensors: {format_names(others)}")
    return {name: LazyTensor(tuple(t.shape), t.dtype, t.detach) for name, t in contents.items()}


def verify_archives(files: Iterable[Path]) -> None:
    """Read the files of `torch.save` among `files` and compare them with the checksums in them, which PyTorch does not.

    Raises:
        DeltaLlavaError: naming the first file that is damaged.
    """
    for file in files:
        if file.suffix in (".bin", ".pt") and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise DeltaLlavaError(f"{file.name} is damaged: wrong CRC-32 of {damaged}")


def split_shards(tensors: Mapping[str, LazyTensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """Names of the tensors of each weight file, with the file names that transformers uses.

    Args:
        tensors: what to write, in their order.
        max_shard_size: most bytes of tensors per file, as a number or as `2GB`; a larger tensor gets its own file.
    """
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
    """
    total, done = sum(tensor.num_bytes for tensor in tensors.values()), 0
    for file_name, names in shards.items():
        contents: dict[str, torch.Tensor] = {}
        for name in names:
            contents[name] = _separate(tensors[name].load(), contents.values())
            # The extremes take one pass without a copy, and NaN propagates to them.
            if not all(torch.isfinite(extreme) for extreme in torch.aminmax(contents[name])):
                raise DeltaLlavaError(
                    f"{name} holds NaN or Inf, or has values beyond {dtype_name(contents[name].dtype)}"
                )
            done += tensors[name].num_bytes
            if progress is not None:
                progress(done, total)
        (folder / file_name).touch()
        mode = (folder / file_name).stat().st_mode
        save_file(contents, folder / file_name, metadata={"format": "pt"})
        (folder / file_name).chmod(mode)  # safetensors lets only the owner read
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, names in shards.items() for name in names}
        metadata = {"total_parameters": sum(tensor.numel() for tensor in tensors.values()), "total_size": total}
        write_json({"metadata": metadata, "weight_map": weight_map}, folder / "model.safetensors.index.json")


def _separate(tensor: torch.Tensor, others: Iterable[torch.Tensor]) -> torch.Tensor:
    """`tensor` contiguous and without memory shared with `others`, as safetensors needs it; copied only if it must be."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    if whole and all(tensor.data_ptr() != other.data_ptr() for other in others):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def verify_shards(tensors: Mapping[str, LazyTensor], folder: Path, progress: Progress | None = None) -> None:
    """Read back what `write_shards` wrote, and compare every tensor with its source, read again, bit by bit.

    Raises:
        DeltaLlavaError: naming the first tensor that differs.
    """
    written = read_checkpoint(folder).tensors
    total, done = sum(tensor.num_bytes for tensor in tensors.values()), 0
    for name, tensor in tensors.items():
        if name not in written or not same_bits(tensor.load(), written[name].load()):
            raise DeltaLlavaError(f"verification failed: {name} differs from its source")
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


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
