"""Reads the tensors of a checkpoint folder one at a time, and runs no code that a checkpoint may carry."""

import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..utils.errors import one_line
from ..utils.files import read_json
from .errors import ConversionError, listed


# The order in which transformers looks for weights; then what training frameworks leave after consolidating.
_WEIGHT_FILES = (
    ("model", ".safetensors"),
    ("pytorch_model", ".bin"),
    ("pytorch_model_fsdp", ".bin"),
    ("pytorch_model", ".pt"),
    ("model", ".pt"),
    ("consolidated", ".pt"),
)
# Under these keys some frameworks put the weights into a dictionary of their own.
_WRAPPERS = ("module", "model", "state_dict")
_SAFETENSORS_DTYPES = {
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
_DTYPES = set(_SAFETENSORS_DTYPES.values())


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed; `load` reads it anew at each call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, and the files that were read: the weights and their index."""

    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open the weights of `folder`: safetensors or pickled (`.bin`), in one file or in shards with an index.

    Only headers are read; values stay on disk until a tensor's `load`.

    Raises:
        ConversionError: no weights, incomplete shards, a tensor that is in two shards or is empty, an index that
            disagrees with its shards, a damaged file, or a pickle that holds anything but tensors.
    """
    files, index = _find_weights(folder)
    tensors: dict[str, LazyTensor] = {}
    origin: dict[str, str] = {}
    duplicates: list[str] = []
    for file in files:
        contents = _open_file(file)
        duplicates += [f"{name} (in {origin[name]} and {file.name})" for name in contents if name in origin]
        tensors.update(contents)
        origin.update(dict.fromkeys(contents, file.name))
    if duplicates:
        raise ConversionError(f"The shards of {folder.name} hold tensors twice: {listed(duplicates)}.")
    if index is not None:
        _check_index(index, origin)
    _refuse_empty(tensors)
    return Checkpoint(tensors, (*files, *([index] if index else [])))


def open_weights(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, safetensors or pickled; raises as `read_checkpoint` does."""
    tensors = _open_file(file)
    _refuse_empty(tensors)
    return tensors


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds weights under a name that `read_checkpoint` looks for."""
    return any(
        (folder / f"{stem}{suffix}").is_file()
        or (folder / f"{stem}{suffix}.index.json").is_file()
        or any(folder.glob(f"{stem}-*-of-*{suffix}"))
        for stem, suffix in _WEIGHT_FILES
    )


def _refuse_empty(tensors: dict[str, LazyTensor]) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.num_bytes == 0]
    if empty:
        raise ConversionError(
            f"Empty tensors, as DeepSpeed ZeRO-3 leaves behind without consolidation: {listed(empty)}; save the "
            "checkpoint with stage3_gather_16bit_weights_on_model_save, or consolidate it with zero_to_fp32.py."
        )


def _open_file(file: Path) -> dict[str, LazyTensor]:
    contents = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
    # DistributedDataParallel and DeepSpeed put their own level before every name.
    if contents and all(name.startswith("module.") for name in contents):
        return {name.removeprefix("module."): tensor for name, tensor in contents.items()}
    return contents


def _find_weights(folder: Path) -> tuple[list[Path], Path | None]:
    """The weight files of `folder`, and their index where there is one."""
    for stem, suffix in _WEIGHT_FILES:
        single = folder / (stem + suffix)
        if single.is_file():
            return [single], None
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return [folder / name for name in sorted(set(_weight_map(index).values()))], index
        shards = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
        if shards:
            return _all_shards(shards), None
    if any(folder.glob("global_step*")) or any(folder.rglob("*_model_states.pt")):
        raise ConversionError(
            f"{folder.name} holds DeepSpeed's own files, which are parts of tensors; consolidate them with "
            "zero_to_fp32.py into a pytorch_model.bin."
        )
    raise ConversionError(
        f"No weights in {folder.name}: expected model.safetensors, pytorch_model.bin or .pt, their shards, "
        "mm_projector.bin, or adapter_model.safetensors or .bin."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Which tensor is in which file, from an index; ConversionError unless these are files beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index.name} has no weight_map.")
    names = weight_map.values()
    strange = {str(name) for name in names if not isinstance(name, str) or Path(name).name != name or len(name) > 255}
    if strange:
        raise ConversionError(f"{index.name} names files outside its own folder: {listed(strange)}.")
    missing = {name for name in names if not (index.parent / name).is_file()}
    if missing:
        raise ConversionError(f"{index.name} names files that are not there: {listed(missing)}.")
    return weight_map


def _all_shards(shards: list[Path]) -> list[Path]:
    """`shards` where they are complete: 1-of-n to n-of-n."""
    numbers = [tuple(map(int, match.groups())) for s in shards if (match := re.search(r"-(\d+)-of-(\d+)\.", s.name))]
    total = numbers[0][1] if numbers else 0
    if numbers != [(i, total) for i in range(1, total + 1)] or len(numbers) != len(shards):
        raise ConversionError(f"Shards are missing: {listed(shard.name for shard in shards)} is not a complete set.")
    return shards


def _check_index(index: Path, origin: dict[str, str]) -> None:
    """Refuse an index that names other tensors, or other places, than the shards hold."""
    weight_map = _weight_map(index)
    wrong = [name for name in weight_map.keys() | origin.keys() if weight_map.get(name) != origin.get(name)]
    if wrong:
        raise ConversionError(f"{index.name} and the shards disagree about {listed(wrong)}.")


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    try:
        handle = safe_open(file, framework="pt")
        return {name: _safetensors_entry(handle, name, file) for name in handle.keys()}
    except SafetensorError as error:
        raise ConversionError(f"{file.name} is not a readable safetensors file: {error}.") from error


def _safetensors_entry(handle: safe_open, name: str, file: Path) -> LazyTensor:
    entry = handle.get_slice(name)
    dtype = _SAFETENSORS_DTYPES.get(entry.get_dtype())
    if dtype is None:
        raise ConversionError(f"{name} in {file.name} has the unsupported type {entry.get_dtype()}.")
    return LazyTensor(tuple(entry.get_shape()), dtype, partial(handle.get_tensor, name))


def _open_pickle(file: Path) -> dict[str, LazyTensor]:
    try:
        _check_archive(file)
        # `weights_only` builds tensors and containers, and refuses everything else before running it;
        # `mmap` leaves the values on disk.
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{file.name} was refused without running it: its pickle holds more than plain tensors."
        ) from error
    except (ConversionError, OSError):
        raise
    except Exception as error:  # damaged bytes raise all kinds of errors
        reason = one_line(str(error).strip().split("\n")[0] or error)
        raise ConversionError(f"{file.name} is not a readable PyTorch checkpoint: {reason}.") from error
    wrapped = [contents[key] for key in _WRAPPERS if isinstance(contents, dict) and key in contents]
    if len(wrapped) == 1 and isinstance(wrapped[0], dict):
        contents = wrapped[0]
    if not isinstance(contents, dict):
        raise ConversionError(f"{file.name} should map names to tensors, but holds a {type(contents).__name__}.")
    strange = [str(name) for name, value in contents.items() if not (isinstance(name, str) and _is_plain(value))]
    if strange:
        raise ConversionError(f"{file.name} holds entries that are not plain tensors: {listed(strange)}.")
    types = {f"{name} ({value.dtype})" for name, value in contents.items() if value.dtype not in _DTYPES}
    if types:
        raise ConversionError(f"{file.name} has tensors of unsupported types: {listed(types)}.")
    return {
        name: LazyTensor(tuple(value.shape), value.dtype, partial(_detached, value))
        for name, value in contents.items()
    }


def _check_archive(file: Path, values: bool = False) -> None:
    """Refuse a `.bin` file, which is a zip archive, whose parts are not where it says; with `values`, by checksum, too."""
    if not zipfile.is_zipfile(file):
        return  # older PyTorch wrote bare pickles
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as stream:
                    while values and stream.read(1 << 20):
                        pass
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
        raise ConversionError(f"{file.name} is damaged: {one_line(error)}.") from error


def verify_archives(files: Iterable[Path]) -> None:
    """Read all of the `.bin` files among `files` and compare it with the checksums in them; PyTorch does not.

    Raises:
        ConversionError: naming the first file that is damaged.
    """
    for file in files:
        if file.suffix != ".safetensors":
            _check_archive(file, values=True)


def _is_plain(value: object) -> bool:
    """Whether `value` is an ordinary tensor in memory: no subclass, not sparse, not on the meta device."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return value.layout is torch.strided and value.device.type == "cpu"  # type: ignore[attr-defined]


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()
