"""Emulation of casts on a CPU that cannot run them: every value is rounded, every operation is float32's.

That is what a runtime does that multiplies low precisions and accumulates in float32, so such a graph can be verified
by ONNX Runtime's CPU provider. It has no bf16 convolution; and fp16 it computes in float32 without rounding between
operations, so that what would overflow on a GPU does not there. Rounding and back are two Casts, which it does obey.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

import numpy as np

from repmlp_deploy.convert.graph.lowering.cast import float_tensors
from repmlp_deploy.errors import MissingDependency
from repmlp_deploy.precision import PRECISIONS, Precision

try:
    import onnx
    from onnx import NodeProto, TensorProto, helper, numpy_helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["emulate", "emulate_casts", "runnable_graphs"]


def emulate(graph: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return a float32 graph that rounds as a GPU does in a precision; `graph` itself if nothing needs emulation."""
    entry = PRECISIONS[precision]
    emulator = entry.load_emulator()
    return graph if emulator is None else emulator(graph, entry)


def runnable_graphs(graph: onnx.ModelProto, precision: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yield every way to run a graph on a CPU, with its name: unchanged, and as a GPU would round."""
    entry = PRECISIONS[precision]
    if entry.runs_on_cpu:
        yield f"{precision} ONNX", graph
    if entry.emulator:
        yield f"{precision} ONNX, emulated", emulate(graph, precision)


def emulate_casts(graph: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """Return a float32 graph that rounds wherever `graph` has the precision's element type; `graph` does not change."""
    kind = TensorProto.DataType.Value(precision.onnx_type)
    weights = [_widened(tensor, kind) for tensor in graph.graph.initializer]
    low = {tensor.name for tensor in graph.graph.initializer if tensor.data_type == kind} | float_tensors(graph, kind)
    nodes = [made for node in graph.graph.node for made in _emulated(node, low, precision)]
    made = helper.make_graph(nodes, graph.graph.name, graph.graph.input, graph.graph.output, weights)
    return helper.make_model(made, opset_imports=graph.opset_import, ir_version=graph.ir_version)


def _emulated(node: NodeProto, low: AbstractSet[str], precision: Precision) -> Iterator[NodeProto]:
    """Yield the nodes that replace a node; `low` are the names of values in the low type."""
    kind = TensorProto.DataType.Value(precision.onnx_type)
    to = next((a.i for a in node.attribute if a.name == "to"), None) if node.op_type == "Cast" else None
    if to == TensorProto.FLOAT and node.input[0] in low:
        yield helper.make_node("Identity", node.input, node.output, name=node.name)
        return
    if to == kind:  # its input is float32 already: only the rounding is left of it
        yield from _rounding(node.input[0], node.output[0], precision)
        return
    made = NodeProto()
    made.CopyFrom(node)
    for i, name in enumerate(node.output):
        made.output[i] = f"{name}_unrounded" if name in low else name
    yield made
    for name in node.output:
        if name in low:
            yield from _rounding(f"{name}_unrounded", name, precision)


def _rounding(source: str, result: str, precision: Precision) -> Iterator[NodeProto]:
    """Yield two Casts: to the low type and back."""
    kind = TensorProto.DataType.Value(precision.onnx_type)
    between = f"{result}_{precision.name}"
    yield helper.make_node("Cast", [source], [between], name=f"{result}_round", to=kind)
    yield helper.make_node("Cast", [between], [result], name=f"{result}_widen", to=TensorProto.FLOAT)


def _widened(tensor: TensorProto, kind: int) -> TensorProto:
    if tensor.data_type != kind:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
