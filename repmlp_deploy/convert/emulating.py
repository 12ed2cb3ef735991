"""Emulation of bf16 where nothing can run it: every value is rounded to bf16, every operation is float32's.

That is what a runtime does that multiplies bf16 and accumulates in float32, so a bf16 graph can be verified by ONNX
Runtime's CPU provider, which has no bf16 convolution. Rounding to bf16 and back are two Casts, which that provider has.
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

__all__ = ["emulate_bf16"]


def emulate_bf16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph that rounds wherever `graph`, as `set_precision` makes it, is bf16; `graph` is left alone."""
    weights = [_widened(tensor) for tensor in graph.graph.initializer]
    low = {tensor.name for tensor in graph.graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    nodes = [made for node in graph.graph.node for made in _emulated(node, low)]
    made = helper.make_graph(nodes, graph.graph.name, graph.graph.input, graph.graph.output, weights)
    return helper.make_model(made, opset_imports=graph.opset_import, ir_version=graph.ir_version)


def _emulated(node: NodeProto, low: set[str]) -> Iterator[NodeProto]:
    """What takes the place of a node; the names of its rounded outputs join `low`."""
    made = NodeProto()
    made.CopyFrom(node)
    to = next((a.i for a in node.attribute if a.name == "to"), None) if node.op_type == "Cast" else None
    if to is not None and node.input[0] in low and to == TensorProto.FLOAT:
        yield helper.make_node("Identity", node.input, node.output, name=node.name)
        return
    rounds = to == TensorProto.BFLOAT16 if to is not None else any(name in low for name in node.input)
    if not rounds:
        yield made
        return
    if to is not None:  # its input is float32 already: only the rounding is left of it
        yield from _rounding(node.input[0], node.output[0])
    else:
        for i, name in enumerate(node.output):
            made.output[i] = f"{name}_unrounded"
        yield made
        for name in node.output:
            yield from _rounding(f"{name}_unrounded", name)
    low.update(node.output)


def _rounding(source: str, result: str) -> Iterator[NodeProto]:
    """Two Casts: to bf16 and back."""
    between = f"{result}_bf16"
    yield helper.make_node("Cast", [source], [between], name=f"{result}_round", to=TensorProto.BFLOAT16)
    yield helper.make_node("Cast", [between], [result], name=f"{result}_widen", to=TensorProto.FLOAT)


def _widened(tensor: TensorProto) -> TensorProto:
    if tensor.data_type != TensorProto.BFLOAT16:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
