"""Weights of graphs: in separate files, equal tensors once, and quantised in blocks or stored in half precision."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from ..errors import DeltaLlavaError


# Smaller tensors stay in the graph: shapes among them, which runtimes read before the weights.
MIN_BYTES = 1024
# What a browser's array can hold, with room.
MAX_FILE_BYTES = 2_000_000_000
# Runtimes map files into memory, page by page.
ALIGNMENT = 4096
BLOCK_SIZE = 32
# Lets onnxruntime round activations to 8 bits, block by block, on the CPU; without it 8 bits are slower than float32.
ACCURACY_LEVEL = 4


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
            if tensor is None:
                continue
            if tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and not np.isfinite(tensor.numpy()).all():
                raise DeltaLlavaError(
                    f"{file_name}: {value.name} holds NaN or Inf, as float16 does where it overflows"
                )
            if tensor.nbytes < MIN_BYTES:
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
                offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
                file.write(bytes(offset - file.tell()))
                file.write(data)
            self._places[digest] = self.files[-1], offset
        return self._places[digest]

    @contextmanager
    def _open(self, size: int) -> Iterator[BinaryIO]:
        """The last file, at its end, or a new one where `size` more bytes would not fit."""
        if not self.files or (self.folder / self.files[-1]).stat().st_size + ALIGNMENT + size > self.max_bytes:
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


def quantize_blocks(model: ir.Model, bits: int) -> ir.Model:
    """A copy of a graph with the weights of its matrix products, and in 4 bits also the embeddings, in blocks of `bits`.

    By onnxruntime's own tool, which has no embeddings of 8 bits.
    """
    quantizer = _quantizer().MatMulNBitsQuantizer(
        ir.to_proto(model),
        bits=bits,
        block_size=BLOCK_SIZE,
        accuracy_level=ACCURACY_LEVEL,
        op_types_to_quantize=("MatMul", "Gather"),
    )
    with np.errstate(all="ignore"):  # rows of zeros, of tokens that were never trained
        quantizer.process()
    return ir.from_proto(quantizer.model.model)


def store_half(model: ir.Model) -> ir.Model:
    """A copy of a graph that keeps its matrices in float16, and computes in float32 as before."""
    proto = ir.to_proto(model)
    graph = proto.graph
    for index, tensor in enumerate(graph.initializer):
        values, name = numpy_helper.to_array(tensor), tensor.name
        if values.dtype != np.float32 or values.ndim < 2 or np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            continue
        half = f"{name}_half"
        graph.initializer[index].CopyFrom(numpy_helper.from_array(values.astype(np.float16), half))
        readers = [node for node in graph.node if name in node.input]
        if any(node.op_type != "Gather" for node in readers):
            graph.node.insert(0, _to_float(half, name))  # runtimes do it once, when they load the graph
            continue
        for node in readers:  # of an embedding only the rows that are read
            output, node.input[0], node.output[0] = node.output[0], half, f"{node.output[0]}_half"
            graph.node.insert(list(graph.node).index(node) + 1, _to_float(node.output[0], output))
    return ir.from_proto(proto)


def _to_float(source: str, target: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], to=onnx.TensorProto.FLOAT)


def _quantizer() -> ModuleType:
    """onnxruntime's module, which on import makes every logger of the process print."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    from onnxruntime.quantization import matmul_nbits_quantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    matmul_nbits_quantizer.logger.setLevel(logging.WARNING)
    return matmul_nbits_quantizer
