"""Weights of graphs in files beside them: equal tensors once, in files that a browser can hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir


# Smaller tensors stay in the graph: shapes among them, which runtimes want to read before the weights.
MIN_BYTES = 1024
# What a browser's array can hold, with room.
MAX_FILE_BYTES = 2_000_000_000
# Runtimes map files into memory, page by page.
_ALIGNMENT = 4096


class WeightFiles:
    """`NAME_data`, `NAME_data_1`, ...: the files to which graphs write their weights."""

    def __init__(self, folder: Path, name: str, max_bytes: int = MAX_FILE_BYTES):
        self.folder, self.name, self.max_bytes = folder, name, max_bytes
        self.files: list[str] = []
        self._places: dict[bytes, tuple[str, int]] = {}

    def save(self, model: ir.Model, file_name: str) -> None:
        """Write the graph to `file_name`, and those of its weights that no graph has written yet to the files."""
        _forget_origins(model)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < MIN_BYTES:
                continue
            location, offset = self._place(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                location,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=self.folder,
            )
        ir.save(model, self.folder / file_name)

    def _place(self, data: bytes) -> tuple[str, int]:
        digest = sha256(data).digest()
        if digest not in self._places:
            with self._open(len(data)) as file:
                offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
                file.write(bytes(offset - file.tell()))
                file.write(data)
            self._places[digest] = self.files[-1], offset
        return self._places[digest]

    @contextmanager
    def _open(self, size: int) -> Iterator[BinaryIO]:
        """The last file, at its end, or a new one where `size` more bytes would not fit."""
        if not self.files or (self.folder / self.files[-1]).stat().st_size + _ALIGNMENT + size > self.max_bytes:
            self.files.append(f"{self.name}_data" + (f"_{len(self.files)}" if self.files else ""))
        with (self.folder / self.files[-1]).open("ab") as file:
            yield file


def _forget_origins(model: ir.Model) -> None:
    """Drop what the exporter notes about each node: lines and paths of the code it came from."""
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
