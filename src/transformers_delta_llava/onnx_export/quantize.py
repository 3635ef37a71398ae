"""Smaller weights: blocks of 8 or 4 bits for the language model, half precision for the rest."""

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer


BLOCK_SIZE = 32


def quantize_blocks(model: ir.Model, bits: int) -> ir.Model:
    """A copy of a graph with the weights of its matrix products and embeddings in blocks of `bits`, by onnxruntime's tool."""
    quantizer = MatMulNBitsQuantizer(
        ir.to_proto(model), bits=bits, block_size=BLOCK_SIZE, op_types_to_quantize=("MatMul", "Gather")
    )
    quantizer.process()
    return ir.from_proto(quantizer.model.model)


def store_half(model: ir.Model) -> ir.Model:
    """A copy of a graph that keeps its matrices in float16, and computes in float32 as before."""
    proto = ir.to_proto(model)
    for index, tensor in enumerate(proto.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.ndim < 2 or np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            continue
        name = tensor.name
        proto.graph.initializer[index].CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        proto.graph.node.insert(0, onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
    return ir.from_proto(proto)
