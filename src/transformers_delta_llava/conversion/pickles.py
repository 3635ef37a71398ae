"""Opens the `.bin` files of `torch.save` as plain tensors, and runs no code that they may carry.

Such a file is a zip archive. PyTorch reads the bytes of an entry whatever the archive says of compression, encryption or
sizes, and compares no checksums, so all of that is checked here. PyTorch before 1.6 wrote pickles in a row instead.
"""

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from ..utils.errors import DeltaLlavaError, format_names, one_line


# Under these keys some frameworks put the weights into a dictionary of their own.
_WRAPPERS = ("module", "model", "state_dict")
# Flags of a zip entry (encrypted, strongly encrypted, masked), and what stands for a size of 4 GiB and more.
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_IN_ZIP64 = 0xFFFFFFFF
_END_OF_ARCHIVE = 22  # bytes of the last record, without a comment


def open_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name; their values stay on disk, but for files older than PyTorch 1.6.

    Raises:
        DeltaLlavaError: the file is damaged, holds anything but tensors, or was not written by `torch.save`.
    """
    entries = check_archive(file) if is_archive(file) else None
    contents = _load(file, mmap=entries is not None)
    others = [str(name) for name, value in contents.items() if not (isinstance(name, str) and _is_plain(value))]
    if others:
        raise DeltaLlavaError(f"{file.name} holds entries that are not plain tensors: {format_names(others)}.")
    if entries is not None:
        _check_storages(file, contents, entries)
    return contents


def is_archive(file: Path) -> bool:
    """Whether a file is, or begins as, a zip archive."""
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04" or zipfile.is_zipfile(file)


def check_archive(file: Path, values: bool = False) -> dict[int, int]:
    """The size of every entry of a `.bin` file by the offset of its first byte.

    Args:
        file: the file.
        values: also compare every entry with its checksum, which reads the whole file.

    Raises:
        DeltaLlavaError: the archive is damaged, or PyTorch did not write it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = _read_entries(archive)
            for entry in archive.infolist():
                with archive.open(entry) as content:
                    while values and content.read(1 << 20):
                        pass
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
        raise DeltaLlavaError(f"{file.name} is damaged: {one_line(error)}.") from error
    return entries


def _load(file: Path, mmap: bool) -> dict[str, torch.Tensor]:
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


def _is_plain(value: object) -> bool:
    """Whether `value` is an ordinary tensor in memory: no subclass, not sparse, not on the meta device."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return value.layout is torch.strided and value.device.type == "cpu"  # type: ignore[attr-defined]


def _read_entries(archive: zipfile.ZipFile) -> dict[int, int]:
    """The size of every entry by its offset; ValueError, with the reason, for an archive that PyTorch did not write."""
    assert archive.fp is not None
    names: set[str] = set()
    end, entries = 0, {}
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
        # The header holds the size, or 0 where it was not known yet, or a mark where the field is too small.
        if entry.compress_size != entry.file_size or not {compressed, size} <= {0, _IN_ZIP64, entry.file_size}:
            raise ValueError(f"the sizes of {entry.filename} in the archive disagree")
        if entry.filename.lower() in names:
            raise ValueError(f"{entry.filename} is there twice")
        if entry.header_offset < end or (not names and entry.header_offset):
            raise ValueError(f"{entry.filename} overlaps the entry before it, or something lies before the first")
        names.add(entry.filename.lower())
        begin = entry.header_offset + len(header) + name_length + extra_length
        end = begin + entry.file_size
        entries[begin] = entry.file_size
    archive.fp.seek(-_END_OF_ARCHIVE, os.SEEK_END)
    if end > archive.start_dir or archive.fp.read(4) != b"PK\x05\x06":
        raise ValueError("it holds more than its entries")
    return entries


def _check_storages(file: Path, contents: dict[str, torch.Tensor], entries: Mapping[int, int]) -> None:
    """Refuse tensors whose storage is not exactly one entry: PyTorch maps as many bytes as the pickle claims.

    The address at which the file is mapped is not known, so each entry that may be the first storage is tried.
    """
    storages = {
        storage.data_ptr(): storage.nbytes() for t in contents.values() if (storage := t.untyped_storage()).nbytes()
    }
    if not storages:
        return
    first = min(storages)
    bases = (first - offset for offset, size in entries.items() if size == storages[first])
    if not any(all(entries.get(address - base) == size for address, size in storages.items()) for base in bases):
        raise DeltaLlavaError(f"{file.name} is damaged: tensors in it have other sizes than their entries.")
