"""Reads the tensors of a checkpoint folder one at a time, and runs no code that a checkpoint may carry."""

import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..utils.errors import DeltaLlavaError, format_names, one_line
from ..utils.files import read_json, write_json


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
# Flags of a zip entry (encrypted, strongly encrypted, masked), and what stands for a size of 4 GiB and more.
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_IN_ZIP64 = 0xFFFFFFFF
_END_OF_ARCHIVE = 22  # bytes of the last record, without a comment


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
        DeltaLlavaError: no weights, incomplete shards, a tensor that is in two shards or is empty, an index that
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
        raise DeltaLlavaError(f"The shards of {folder.name} hold tensors twice: {format_names(duplicates)}.")
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
        raise DeltaLlavaError(
            f"Empty tensors, as DeepSpeed ZeRO-3 leaves behind without consolidation: {format_names(empty)}; save the "
            "checkpoint with stage3_gather_16bit_weights_on_model_save, or consolidate it with zero_to_fp32.py."
        )


def _open_file(file: Path) -> dict[str, LazyTensor]:
    if not file.is_file():  # a pipe would never end
        raise DeltaLlavaError(f"{file.name} is missing, or not a regular file.")
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
        raise DeltaLlavaError(
            f"{folder.name} holds DeepSpeed's own files, which are parts of tensors; consolidate them with "
            "zero_to_fp32.py into a pytorch_model.bin."
        )
    raise DeltaLlavaError(
        f"No weights in {folder.name}: expected model.safetensors, pytorch_model.bin or .pt, their shards, "
        "mm_projector.bin, or adapter_model.safetensors or .bin."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Which tensor is in which file, from an index; DeltaLlavaError unless these are files beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DeltaLlavaError(f"{index.name} has no weight_map.")
    names = weight_map.values()
    strange = {str(name) for name in names if not isinstance(name, str) or Path(name).name != name or len(name) > 255}
    if strange:
        raise DeltaLlavaError(f"{index.name} names files outside its own folder: {format_names(strange)}.")
    missing = {name for name in names if not (index.parent / name).is_file()}
    if missing:
        raise DeltaLlavaError(f"{index.name} names files that are not there: {format_names(missing)}.")
    return weight_map


def _all_shards(shards: list[Path]) -> list[Path]:
    """`shards` where they are complete: 1-of-n to n-of-n."""
    matches = [re.search(r"-(\d{1,9})-of-(\d{1,9})\.", shard.name) for shard in shards]
    numbers = [(int(match[1]), int(match[2])) for match in matches if match]
    # How many there are is compared before anything is built for the number that a name claims.
    if numbers != [(i, len(shards)) for i in range(1, len(shards) + 1)]:
        raise DeltaLlavaError(
            f"Shards are missing: {format_names(shard.name for shard in shards)} is not a complete set."
        )
    return shards


def _check_index(index: Path, origin: dict[str, str]) -> None:
    """Refuse an index that names other tensors, or other places, than the shards hold."""
    weight_map = _weight_map(index)
    wrong = [name for name in weight_map.keys() | origin.keys() if weight_map.get(name) != origin.get(name)]
    if wrong:
        raise DeltaLlavaError(f"{index.name} and the shards disagree about {format_names(wrong)}.")


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    try:
        handle = safe_open(file, framework="pt")
        return {name: _safetensors_entry(handle, name, file) for name in handle.keys()}
    except SafetensorError as error:
        raise DeltaLlavaError(f"{file.name} is not a readable safetensors file: {error}.") from error


def _safetensors_entry(handle: safe_open, name: str, file: Path) -> LazyTensor:
    entry = handle.get_slice(name)
    dtype = _SAFETENSORS_DTYPES.get(entry.get_dtype())
    if dtype is None:
        raise DeltaLlavaError(f"{name} in {file.name} has the unsupported type {entry.get_dtype()}.")
    return LazyTensor(tuple(entry.get_shape()), dtype, partial(handle.get_tensor, name))


def _open_pickle(file: Path) -> dict[str, LazyTensor]:
    records = _check_archive(file)
    contents = _load_pickle(file, mmap=records is not None)
    strange = [str(name) for name, value in contents.items() if not (isinstance(name, str) and _is_plain(value))]
    if strange:
        raise DeltaLlavaError(f"{file.name} holds entries that are not plain tensors: {format_names(strange)}.")
    types = {f"{name} ({value.dtype})" for name, value in contents.items() if value.dtype not in _DTYPES}
    if types:
        raise DeltaLlavaError(f"{file.name} has tensors of unsupported types: {format_names(types)}.")
    if records is not None:
        _check_storages(file, contents, records)
    return {
        name: LazyTensor(
            tuple(value.shape),
            value.dtype,
            partial(_load_from_legacy, file, name) if records is None else partial(_detached, value),
        )
        for name, value in contents.items()
    }


def _load_pickle(file: Path, mmap: bool) -> dict[str, torch.Tensor]:
    """The dictionary in a `.bin` file; with `mmap` its values stay on disk, which files older than PyTorch 1.6 cannot."""
    try:
        # `weights_only` builds tensors and containers, and refuses everything else before running it.
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise DeltaLlavaError(
            f"{file.name} was refused without running it: its pickle holds more than plain tensors."
        ) from error
    except OSError:
        raise
    except Exception as error:  # damaged bytes raise all kinds of errors
        reason = one_line(str(error).strip().split("\n")[0] or error)
        raise DeltaLlavaError(f"{file.name} is not a readable PyTorch checkpoint: {reason}.") from error
    wrapped = [contents[key] for key in _WRAPPERS if isinstance(contents, dict) and key in contents]
    if len(wrapped) == 1 and isinstance(wrapped[0], dict):
        contents = wrapped[0]
    if not isinstance(contents, dict):
        raise DeltaLlavaError(f"{file.name} should map names to tensors, but holds a {type(contents).__name__}.")
    return contents


# Files older than PyTorch 1.6 are read whole: one at a time, since tensors are mostly asked for file by file.
_load_legacy = lru_cache(maxsize=1)(partial(_load_pickle, mmap=False))


def _load_from_legacy(file: Path, name: str) -> torch.Tensor:
    tensors = _load_legacy(file)
    names = {key.removeprefix("module."): key for key in tensors}
    return tensors[name if name in tensors else names[name]].detach()


def _check_archive(file: Path, values: bool = False) -> dict[int, int] | None:
    """Refuse a `.bin` file, which is a zip archive, that is not as PyTorch writes and reads them.

    PyTorch takes the bytes of an entry as they stand in the file, whatever the archive says of compression, encryption or
    sizes, and checks no sums.

    Args:
        file: the file.
        values: compare every entry with its checksum, too, which reads the whole file.

    Returns:
        The size of every entry by the place of its first byte; None for the bare pickles that PyTorch wrote before 1.6.
    """
    with file.open("rb") as stream:
        begins = stream.read(4) == b"PK\x03\x04"
    if not begins and not zipfile.is_zipfile(file):
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            records = _entries(archive)
            for entry in archive.infolist():
                with archive.open(entry) as content:
                    while values and content.read(1 << 20):
                        pass
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
        raise DeltaLlavaError(f"{file.name} is damaged: {one_line(error)}.") from error
    return records


def _entries(archive: zipfile.ZipFile) -> dict[int, int]:
    """Size by place of the first byte; ValueError, saying what is odd, for an archive that PyTorch did not write."""
    assert archive.fp is not None
    names: set[str] = set()
    end, records = 0, {}
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        archive.fp.seek(entry.header_offset)
        header = archive.fp.read(30)
        if len(header) < 30:
            raise ValueError(f"the file ends before {entry.filename}")
        _, _, flags, method, *_, compressed, size, name_length, extra_length = struct.unpack("<4s5H3I2H", header)
        if entry.compress_type != zipfile.ZIP_STORED or method != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename} is compressed, which PyTorch would read as weights; was it repacked?")
        if (entry.flag_bits | flags) & _ENCRYPTED:
            raise ValueError(f"{entry.filename} is encrypted")
        # Written where the size is not known yet (0), or too large for the field; else it is the size.
        if entry.compress_size != entry.file_size or not {compressed, size} <= {0, _IN_ZIP64, entry.file_size}:
            raise ValueError(f"the sizes of {entry.filename} in the archive disagree")
        if entry.filename.lower() in names:
            raise ValueError(f"{entry.filename} is there twice")
        if entry.header_offset < end or (not names and entry.header_offset):
            raise ValueError(f"{entry.filename} overlaps the entry before it, or something lies before the first")
        names.add(entry.filename.lower())
        begin = entry.header_offset + len(header) + name_length + extra_length
        end = begin + entry.file_size
        records[begin] = entry.file_size
    archive.fp.seek(-_END_OF_ARCHIVE, os.SEEK_END)
    if end > archive.start_dir or archive.fp.read(4) != b"PK\x05\x06":
        raise ValueError("it holds more than its entries")
    return records


def _check_storages(file: Path, contents: dict[str, torch.Tensor], records: dict[int, int]) -> None:
    """Refuse tensors whose values are not exactly one entry each: PyTorch maps as many bytes as the pickle claims."""
    places = {
        storage.data_ptr(): storage.nbytes() for t in contents.values() if (storage := t.untyped_storage()).nbytes()
    }
    if not places:
        return
    first = min(places)
    starts = (first - begin for begin, size in records.items() if size == places[first])
    if not any(all(records.get(place - start) == size for place, size in places.items()) for start in starts):
        raise DeltaLlavaError(f"{file.name} is damaged: tensors in it have other sizes than their entries.")


def verify_archives(files: Iterable[Path]) -> None:
    """Read all of the `.bin` files among `files` and compare it with the checksums in them; PyTorch does not.

    Raises:
        DeltaLlavaError: naming the first file that is damaged.
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


# Called with the bytes written so far and the bytes in all.
Progress = Callable[[int, int], None]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as `2GB` or `500MB` (decimal), `2GiB` (binary), or a plain number.

    Raises:
        DeltaLlavaError: if it is none of these, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    value = int(float(match[1]) * unit) if match and unit else 0
    if value < 1:
        raise DeltaLlavaError(f"max_shard_size={size!r} is not a size; use for instance 2GB or 500MB.")
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
        DeltaLlavaError: naming a tensor that holds NaN or Inf.
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
            raise DeltaLlavaError(f"Verification failed: {name} is not on the disk as it was written.")
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
        raise DeltaLlavaError(
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
