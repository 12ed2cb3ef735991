"""Emulation of fp16 and bf16 where nothing can run them: every value is rounded, every operation is float32's.

That is what a runtime does that multiplies low precisions and accumulates in float32, so such a graph can be verified
by ONNX Runtime's CPU provider. It has no bf16 convolution; and fp16 it computes in float32 without rounding between
operations, so that what would overflow on a GPU does not there. Rounding and back are two Casts, which it does obey.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from repmlp_deploy.errors import MissingDependency

try:
    import onnx
    from onnx import NodeProto, TensorProto, helper, numpy_helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["EMULATORS", "emulate_bf16", "emulate_fp16"]

_SUFFIXES: dict[int, str] = {TensorProto.BFLOAT16: "bf16", TensorProto.FLOAT16: "fp16"}


def emulate_bf16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph that rounds wherever `graph`, as `set_precision` makes it, is bf16; `graph` is left alone."""
    return _emulate(graph, TensorProto.BFLOAT16)


def emulate_fp16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph that rounds wherever `graph`, as `set_precision` makes it, is fp16; `graph` is left alone."""
    return _emulate(graph, TensorProto.FLOAT16)


def _emulate(graph: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    weights = [_widened(tensor, kind) for tensor in graph.graph.initializer]
    low = {tensor.name for tensor in graph.graph.initializer if tensor.data_type == kind}
    nodes = [made for node in graph.graph.node for made in _emulated(node, low, kind)]
    made = helper.make_graph(nodes, graph.graph.name, graph.graph.input, graph.graph.output, weights)
    return helper.make_model(made, opset_imports=graph.opset_import, ir_version=graph.ir_version)


def _emulated(node: NodeProto, low: set[str], kind: int) -> Iterator[NodeProto]:
    """What takes the place of a node; the names of its rounded outputs join `low`."""
    made = NodeProto()
    made.CopyFrom(node)
    to = next((a.i for a in node.attribute if a.name == "to"), None) if node.op_type == "Cast" else None
    if to is not None and node.input[0] in low and to == TensorProto.FLOAT:
        yield helper.make_node("Identity", node.input, node.output, name=node.name)
        return
    rounds = to == kind if to is not None else any(name in low for name in node.input)
    if not rounds:
        yield made
        return
    if to is not None:  # its input is float32 already: only the rounding is left of it
        yield from _rounding(node.input[0], node.output[0], kind)
    else:
        for i, name in enumerate(node.output):
            made.output[i] = f"{name}_unrounded"
        yield made
        for name in node.output:
            yield from _rounding(f"{name}_unrounded", name, kind)
    low.update(node.output)


def _rounding(source: str, result: str, kind: int) -> Iterator[NodeProto]:
    """Two Casts: to the low type and back."""
    between = f"{result}_{_SUFFIXES[kind]}"
    yield helper.make_node("Cast", [source], [between], name=f"{result}_round", to=kind)
    yield helper.make_node("Cast", [between], [result], name=f"{result}_widen", to=TensorProto.FLOAT)


def _widened(tensor: TensorProto, kind: int) -> TensorProto:
    if tensor.data_type != kind:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


EMULATORS = {"bf16": emulate_bf16, "fp16": emulate_fp16}
"""Precision to what emulates it."""
