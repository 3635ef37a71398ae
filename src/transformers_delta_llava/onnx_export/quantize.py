"""Smaller weights: blocks of 8 or 4 bits for the language model, half precision for the rest."""

import logging
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper


BLOCK_SIZE = 32
# onnxruntime's CPU code for blocks is fast where it may round what it multiplies them with to 8 bits as well, block by block; without
# that 8 bits are slower than float32.
ACCURACY_LEVEL = 4


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
    with np.errstate(all="ignore"):  # rows of zeros, of tokens that nobody trained
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
