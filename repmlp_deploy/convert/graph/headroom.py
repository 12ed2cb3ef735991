"""Headroom: how far the values of a graph stay from the largest number of a 16-bit type.

float16 ends at 65504. A value beyond it is infinite, and one that is near on the samples at hand may be beyond on
another image. So the float32 graph is run on these samples, and the largest value that the lowered graph would hold in
the type must be at most 1/4 of its end. Values that stay in float32, written and read, do not count;
bfloat16 has the range of float32. A refitted bundle has only the lowered graph, which is widened to float32 first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.convert.graph.lowering.cast import float_tensors
from repmlp_deploy.convert.graph.nodes import module_of
from repmlp_deploy.convert.graph.proto import copy_graph, serialize_model, without_weights
from repmlp_deploy.convert.graph.run import onnx_run
from repmlp_deploy.errors import MissingDependency
from repmlp_deploy.precision import Precision

try:
    import onnx
    from onnx import helper, numpy_helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["MARGIN", "Headroom", "find_headroom", "widened_graph"]

MARGIN = 4.0
"""How many times the largest value seen must fit into the type: other inputs reach further than the samples do."""

_ZERO = "headroom_zero"


@dataclass(frozen=True)
class Headroom:
    """The largest value that a graph holds in a limited type.

    Attributes:
        largest: its absolute value; infinite or NaN if float32 cannot hold it.
        module: of the network that it belongs to, empty where none is known.
        node: operator and name of the node that gives it.
        end: the largest number of the type.
    """

    largest: float
    module: str
    node: str
    end: float

    @property
    def margin(self) -> float:
        """How many times the value fits into the type."""
        return self.end / self.largest if self.largest > 0 else float("inf")

    @property
    def is_enough(self) -> bool:
        """Whether other inputs may reach further without leaving the type."""
        return bool(self.largest * MARGIN <= self.end)

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says."""
        return {"largest": self.largest, "node": self.node, "module": self.module, "margin": round(self.margin, 2)}


def find_headroom(
    graph: onnx.ModelProto, precision: Precision, kept: Collection[str], batches: Sequence[Sequence[NDArray[Any]]]
) -> Headroom:
    """Return the first value of a graph without enough room; if all have it, the largest.

    −∞, as attention's masks add it, is the same in every type and does not count.

    Args:
        graph: float32; left alone.
        precision: a limited one.
        kept: names of the nodes that stay in float32.
        batches: inputs to run it on, (n, …) each.
    """
    held = list(_held_low(graph, kept))
    marked = copy_graph(graph)
    del marked.graph.output[:]
    marked.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), _ZERO))
    for i, node in enumerate(held):
        value, size, largest = node.output[0], f"headroom_{i}_size", f"headroom_{i}"
        masked, finite = f"headroom_{i}_masked", f"headroom_{i}_finite"
        marked.graph.node.append(helper.make_node("IsInf", [value], [masked], name=masked, detect_positive=0))
        marked.graph.node.append(helper.make_node("Where", [masked, _ZERO, value], [finite], name=finite))
        marked.graph.node.append(helper.make_node("Abs", [finite], [size], name=size))
        marked.graph.node.append(helper.make_node("ReduceMax", [size], [largest], name=largest, keepdims=0))
        marked.graph.output.append(helper.make_tensor_value_info(largest, onnx.TensorProto.FLOAT, []))
    run = onnx_run(serialize_model(marked))
    seen = np.max([[float(value) for value in run(*inputs)] for inputs in batches], axis=0)
    end = float(precision.largest or 0.0)
    found = [
        Headroom(float(value), module_of(node), f"{node.op_type} {node.name}", end)
        for node, value in zip(held, seen, strict=True)
    ]
    return next((one for one in found if not one.is_enough), max(found, key=lambda one: one.largest))


def widened_graph(graph: onnx.ModelProto, precision: Precision) -> tuple[onnx.ModelProto, set[str]]:
    """Return a lowered graph with every value in float32, and the names of the nodes that were in float32 before.

    Both are what `find_headroom` takes. The weights keep the rounding of the low type.

    Args:
        graph: in `precision` by casts; left alone.
        precision: a limited one.
    """
    low = onnx.TensorProto.DataType.Value(precision.onnx_type)
    floats = float_tensors(graph)
    kept = {node.name for node in graph.graph.node if node.output[0] in floats}
    weights = [tensor for tensor in graph.graph.initializer if tensor.data_type == low]
    wide = without_weights(graph, weights, as_inputs=False)
    for tensor in weights:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        wide.graph.initializer.append(numpy_helper.from_array(values, tensor.name))
    for node in wide.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == low:
                attribute.i = onnx.TensorProto.FLOAT
    del wide.graph.value_info[:]  # types of before
    return wide, kept


def _held_low(graph: onnx.ModelProto, kept: Collection[str]) -> Iterator[onnx.NodeProto]:
    """Yield the nodes whose value is held in the low type: lowered, or read by a node that is."""
    floats = float_tensors(graph)
    read_low = {name for node in graph.graph.node if node.name not in kept for name in node.input}
    for node in graph.graph.node:
        if node.output[0] in floats and (node.name not in kept or node.output[0] in read_low):
            yield node
