"""A toy precision that exists in its table entry alone: a 12-bit float, stored in float16 with four bits fewer."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from repmlp_deploy.convert.graph.emulate import emulate_casts
from repmlp_deploy.precision import Precision, Tolerance

TOY = Precision(
    name="fp12",
    element="float12",
    rounding=2.0**-7,
    largest=65504.0,
    bytes_per_weight=2,
    tolerance=Tolerance(floor_ratio=2.0**19, between=0.5, reason="weights round 2^17 times more coarsely than float32"),
    lowering="cast",
    onnx_type="FLOAT16",
    emulator="support.toy_precision:emulate_12_bits",
    sensitive={"ReduceMean": "a toy reason", "Gelu": "another toy reason"},
    wider="fp16",
)


def emulate_12_bits(graph: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """Round as float16, and cut four bits off every weight."""
    cut = onnx.ModelProto()
    cut.CopyFrom(graph)
    for tensor in cut.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            bits = numpy_helper.to_array(tensor).view(np.uint16) & np.uint16(0xFFF0)
            tensor.CopyFrom(numpy_helper.from_array(bits.view(np.float16), tensor.name))
    return emulate_casts(cut, precision)
