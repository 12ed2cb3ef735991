"""Lowering by casts.

**fp16, bf16.** Weights and what flows between nodes have the low type; inputs and outputs of the graph stay float32.
A node that stays in float32 gets a Cast at its borders. Products accumulate in float32 in every runtime we know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np

from repmlp_deploy.convert.graph.lowering.lowered import BY_PATTERN, Kept, Lowered, rebuild
from repmlp_deploy.convert.graph.nodes import module_of
from repmlp_deploy.convert.graph.proto import large_weights, without_weights
from repmlp_deploy.errors import MissingDependency, VerificationError
from repmlp_deploy.precision import Precision

try:
    import onnx
    from onnx import NodeProto, TensorProto, helper, numpy_helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["cast_graph", "float_tensors"]

_TYPED = ("Cast", "CastLike", "ConstantOfShape", "If", "Loop", "Range", "Scan")


@dataclass
class _Casting:
    """The graph under construction."""

    precision: Precision
    types: dict[str, int]
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, TensorProto] = field(default_factory=dict)
    cast: dict[tuple[str, int], str] = field(default_factory=dict)

    def as_type(self, name: str, wanted: int) -> str:
        """Return the name of an activation in a type, cast at most once."""
        if self.types.get(name) in (wanted, None):
            return name
        if (name, wanted) not in self.cast:
            result = f"{name}_as_{TensorProto.DataType.Name(wanted).lower()}"
            self.nodes.append(helper.make_node("Cast", [name], [result], name=f"{result}_cast", to=wanted))
            self.cast[name, wanted] = result
        return self.cast[name, wanted]

    def weight_as(self, tensor: TensorProto, wanted: int) -> str:
        """Return the name of a float32 initializer in a type, converted at most once."""
        if wanted == TensorProto.FLOAT:
            self.weights[tensor.name] = tensor
            return str(tensor.name)
        name = f"{tensor.name}_{TensorProto.DataType.Name(wanted).lower()}"
        if name not in self.weights:
            self.weights[name] = _in_type(tensor, name, self.precision)
        return name


def cast_graph(graph: onnx.ModelProto, precision: Precision, kept_names: AbstractSet[str]) -> Lowered:
    """Return `graph` with every value that may have the low type in it."""
    low = TensorProto.DataType.Value(precision.onnx_type)
    floats = float_tensors(graph)
    initializers = {tensor.name: tensor for tensor in graph.graph.initializer}
    work = _Casting(precision, dict.fromkeys(floats, TensorProto.FLOAT))
    outputs = {value.name for value in graph.graph.output}
    counts: Counter[str] = Counter()
    kept = []
    for node in graph.graph.node:
        reason = _why_float32(node, precision, floats | initializers.keys(), kept_names)
        wanted = TensorProto.FLOAT if reason else low
        made = NodeProto()
        made.CopyFrom(node)
        for i, name in enumerate(node.input):
            tensor = initializers.get(name)
            if tensor is None:
                made.input[i] = work.as_type(name, wanted) if name in floats else name
            elif tensor.data_type == TensorProto.FLOAT:
                made.input[i] = work.weight_as(tensor, wanted)
            else:
                work.weights[name] = tensor
        work.nodes.append(made)
        for i, name in enumerate(node.output):
            if wanted == low and name in floats and name in outputs:
                made.output[i] = f"{name}_low"
                work.nodes.append(helper.make_node("Cast", [made.output[i]], [name], name=f"{name}_cast", to=1))
                work.cast[name, low] = made.output[i]
            elif wanted == low and name in floats:
                work.types[name] = low
        if reason:
            kept.append(Kept(node.name, node.op_type, module_of(node), reason))
        elif any(name in floats for name in node.output):
            counts[node.op_type] += 1
    opset = max(graph.opset_import[0].version, precision.min_opset)
    return Lowered(rebuild(graph, work.nodes, work.weights.values(), opset), dict(counts), tuple(kept))


def _why_float32(node: NodeProto, precision: Precision, floats: set[str], kept_names: AbstractSet[str]) -> str:
    """Return why a node stays in float32; empty if it need not."""
    if not any(name in floats for name in (*node.input, *node.output)):
        return ""
    if node.name in kept_names:
        return BY_PATTERN
    if node.op_type in _TYPED:
        return "its type is its own"
    return precision.sensitive.get(node.op_type, "")


def float_tensors(graph: onnx.ModelProto) -> set[str]:
    """Return activations that are float32, inputs of the graph among them."""
    small = without_weights(graph, large_weights(graph), as_inputs=True)
    inferred = onnx.shape_inference.infer_shapes(small).graph
    weights = {tensor.name for tensor in graph.graph.initializer}
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT} - weights


def _in_type(tensor: TensorProto, name: str, precision: Precision) -> TensorProto:
    """Return a float32 initializer in a low type.

    Raises:
        VerificationError: a value is beyond the type's range.
    """
    kind = TensorProto.DataType.Value(precision.onnx_type)
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        low = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    beyond = np.isfinite(values) & ~np.isfinite(low.astype(np.float32))
    if beyond.any():
        instead = f", or use {precision.wider}" if precision.wider else ""
        module = tensor.name.rpartition(".")[0] or tensor.name
        raise VerificationError(
            f"{tensor.name} holds {float(np.abs(values[beyond]).max()):.3g}, "
            f"beyond {precision.element}'s {precision.largest:g}: pass --keep-fp32 '{module}'{instead}"
        )
    return TensorProto(name=name, data_type=kind, dims=tensor.dims, raw_data=low.tobytes())
