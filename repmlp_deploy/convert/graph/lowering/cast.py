"""Lowering by casts.

**fp16, bf16.** Weights and what flows between nodes have the low type; inputs and outputs of the graph stay float32.
A node that stays in float32 gets a Cast at its borders. Products accumulate in float32 in every runtime we know.
An operator may take float32 alone, or for some of its inputs, such as the scales of Resize: its schema says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np

from repmlp_deploy.convert.graph.lowering.lowered import BY_PATTERN, Kept, Lowered, rebuild
from repmlp_deploy.convert.graph.lowering.names import lowered_name
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

_CRASHES = "ONNX Runtime crashes with it in fp16"
_MATRIX = 2  # axes of one
_TYPED = ("Cast", "CastLike", "Constant", "ConstantOfShape", "If", "Loop", "Range", "Scan")


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

    def lower_outputs(self, made: NodeProto, floats: AbstractSet[str], outputs: AbstractSet[str]) -> None:
        """Note that what a node gives has the low type; an output of the graph is cast back."""
        low = TensorProto.DataType.Value(self.precision.onnx_type)
        for i, name in enumerate(list(made.output)):
            if name in floats and name in outputs:
                made.output[i] = f"{name}_low"
                self.nodes.append(helper.make_node("Cast", [made.output[i]], [name], name=f"{name}_cast", to=1))
                self.cast[name, low] = made.output[i]
            elif name in floats:
                self.types[name] = low

    def weight_as(self, tensor: TensorProto, wanted: int) -> str:
        """Return the name of a float32 initializer in a type, converted at most once."""
        if wanted == TensorProto.FLOAT:
            self.weights[tensor.name] = tensor
            return str(tensor.name)
        name = lowered_name(tensor.name, self.precision.onnx_type)
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
    opset = max(graph.opset_import[0].version, precision.min_opset)
    counts: Counter[str] = Counter()
    kept, crashing = [], _crashing(graph) if low == TensorProto.FLOAT16 else set()
    for node in graph.graph.node:
        reason = _why_float32(node, precision, floats | initializers.keys(), kept_names)
        reason = reason or (_CRASHES if node.output[0] in crashing else "")
        signature = _Signature.of(node, opset, precision)
        reason = reason or signature.refusal(node, floats)
        wanted = TensorProto.FLOAT if reason else low
        made = NodeProto()
        made.CopyFrom(node)
        for i, name in enumerate(node.input):
            kind = wanted if signature.takes(i) else TensorProto.FLOAT
            tensor = initializers.get(name)
            if tensor is None:
                made.input[i] = work.as_type(name, kind) if name in floats else name
            elif tensor.data_type == TensorProto.FLOAT:
                made.input[i] = work.weight_as(tensor, kind)
            else:
                work.weights[name] = tensor
        work.nodes.append(made)
        if wanted == low:
            work.lower_outputs(made, floats, outputs)
        if reason:
            kept.append(Kept(node.name, node.op_type, module_of(node), reason))
        elif any(name in floats for name in node.output):
            counts[node.op_type] += 1
    return Lowered(rebuild(graph, work.nodes, work.weights.values(), opset), dict(counts), tuple(kept))


@dataclass(frozen=True)
class _Signature:
    """What the schema of an operator says of its inputs and outputs: the name of their type, and whether it may be low.

    Attributes:
        inputs: in their order; the last may be of any number. Empty if nothing is known.
        outputs: likewise.
        element: the low type.
    """

    inputs: tuple[tuple[str, bool], ...]
    outputs: tuple[tuple[str, bool], ...]
    element: str

    @classmethod
    def of(cls, node: NodeProto, opset: int, precision: Precision) -> _Signature:
        """Return the signature of a node's operator."""
        element = precision.onnx_type.lower()  # as schemas write it
        if not onnx.defs.has(node.op_type, opset, node.domain):
            return cls((), (), element)
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

        def described(parameters: Sequence[onnx.defs.OpSchema.FormalParameter]) -> tuple[tuple[str, bool], ...]:
            names = [p.type_str for p in parameters]
            return tuple((n, any(f"({element})" in kind for kind in allowed.get(n, (n,)))) for n in names)

        return cls(described(schema.inputs), described(schema.outputs), element)

    def takes(self, i: int) -> bool:
        """Return whether an input may have the low type."""
        return not self.inputs or self.inputs[min(i, len(self.inputs) - 1)][1]

    def refusal(self, node: NodeProto, floats: AbstractSet[str]) -> str:
        """Return why a node cannot give the low type: an output, or an input of an output's type, may not be low."""
        fixed = {kind for kind, is_low in (*self.outputs, *self.inputs) if not is_low}
        last = len(self.outputs) - 1
        given = [self.outputs[min(i, last)][0] for i, name in enumerate(node.output) if name in floats and last >= 0]
        return f"{node.op_type} has no {self.element} in ONNX" if fixed.intersection(given) else ""


def _why_float32(node: NodeProto, precision: Precision, floats: set[str], kept_names: AbstractSet[str]) -> str:
    """Return why a node stays in float32; empty if it need not."""
    if not any(name in floats for name in (*node.input, *node.output)):
        return ""
    if node.name in kept_names:
        return BY_PATTERN
    if node.op_type in _TYPED:
        return "its type is its own"
    return precision.sensitive.get(node.op_type, "")


def _crashing(graph: onnx.ModelProto) -> set[str]:
    """Return the outputs of what ends a process in float16: a Transpose and the MatMul of it and a weight.

    The Transpose moves the first axis to one of the last two, and the weight has fewer axes. ONNX Runtime 1.32 makes
    one operation of such a pair, even with a Cast between, for which it has no kernel in float16.
    """
    turned = {}
    for node in graph.graph.node:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
        if node.op_type == "Transpose" and len(perm) > _MATRIX and perm[:-_MATRIX] == [*range(1, len(perm) - 1)]:
            turned[node.output[0]] = len(perm)
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.graph.initializer}
    found = set()
    for node in graph.graph.node:
        name = next((name for name in node.input if name in turned), "")
        if node.op_type == "MatMul" and name:
            weight = next((ranks[other] for other in node.input if other in ranks), turned[name])
            found |= {name, node.output[0]} if weight != turned[name] else set()
    return found


def float_tensors(graph: onnx.ModelProto, kind: int = TensorProto.FLOAT) -> set[str]:
    """Return activations that are float32, or of another type, inputs of the graph among them."""
    small = without_weights(graph, large_weights(graph), as_inputs=True)
    inferred = onnx.shape_inference.infer_shapes(small).graph
    weights = {tensor.name for tensor in graph.graph.initializer}
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {v.name for v in values if v.type.tensor_type.elem_type == kind} - weights


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
