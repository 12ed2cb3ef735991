"""Precision: a property of the ONNX graph, so that what is verified on a CPU is what an engine is built from.

**fp16, bf16.** Weights and what flows between nodes have the low type; inputs and outputs of the graph stay float32.
A node that stays in float32 gets a Cast at its borders. Products accumulate in float32 in every runtime we know.

**int8.** Explicit QuantizeLinear/DequantizeLinear pairs, symmetric (zero point 0), as TensorRT asks for: on the
activations of every product with constant weights, on the weights themselves, per output channel, and behind every
convolution, without which ONNX Runtime computes it in float32. With ranges measured as ±r,

    x ≈ (r/127) · clip(round(127 x / r), −128, 127).

Pairs of 1×1 convolutions become products over channels first (`pointwise`), which need no pair behind them: a fifth of
the whole network's time in ONNX Runtime. An activation that is only transposed for a product is quantized in front of
the transposition, which then moves a quarter of the bytes.

FC3 of several sharesets, (S, h·w, h·w), has one scale: DequantizeLinear takes scales along one axis, and ONNX Runtime
computes no batched product with those. (Bringing the sharesets to one range beforehand, exactly, by powers of two that
the block's own scale takes back, changed nothing on the networks tried.) The residual sums, gates and GELU between the
products stay in float32: only the copy that a product reads is quantized.

Nothing stays in float32 unsaid: every node that does is listed with its reason.
"""

from __future__ import annotations

import ast
import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.convert.graph.pointwise import with_pointwise_products
from repmlp_deploy.convert.graph.proto import SCOPES, large_weights, without_weights
from repmlp_deploy.errors import InputError, MissingDependency, VerificationError

try:
    import onnx
    from onnx import NodeProto, TensorProto, helper, numpy_helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["PRODUCTS", "Kept", "Lowered", "blocks_of", "module_of", "product_tensors", "set_precision"]

PRODUCTS = ("Conv", "Gemm", "MatMul")

_INT8_MAX = 127
_BF16_OPSET = 22  # the first with bf16 convolutions
_LOW_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_IN_A_MODULE = 2  # scopes of an operation of the network itself
_SINGLE_AXIS_RANK = 2  # MatMul weights of more axes have one scale

_TYPED = ("Cast", "CastLike", "ConstantOfShape", "If", "Loop", "Range", "Scan")
_USER = "kept by pattern"


@dataclass(frozen=True)
class Kept:
    """A node that stays in float32.

    Attributes:
        node: its name in the graph.
        op: its operator.
        module: of the network, as far as the node's weights tell it.
        reason: why.
    """

    node: str
    op: str
    module: str
    reason: str


@dataclass(frozen=True)
class Lowered:
    """A graph in a precision, and what of it is not.

    Attributes:
        model: the graph; inputs and outputs are float32.
        lowered: operator to how many nodes of it compute in the precision.
        kept: nodes that stay in float32.
    """

    model: onnx.ModelProto
    lowered: dict[str, int]
    kept: tuple[Kept, ...]

    def describe(self) -> dict[str, Any]:
        """The report: counts of what was lowered; of what was not, products by name and the rest by reason."""
        products = [k for k in self.kept if k.op in PRODUCTS]
        rest = Counter((k.op, k.reason) for k in self.kept if k.op not in PRODUCTS)
        return {
            "lowered": dict(self.lowered),
            "kept_fp32": [{"node": k.node, "op": k.op, "module": k.module, "reason": k.reason} for k in products]
            + [{"op": op, "count": count, "reason": reason} for (op, reason), count in sorted(rest.items())],
        }


def set_precision(
    graph: onnx.ModelProto,
    precision: str,
    *,
    ranges: Mapping[str, float] | None = None,
    keep_fp32: Sequence[str] = (),
) -> Lowered:
    """`graph` in a precision; `graph` itself is left alone.

    Args:
        graph: float32, simplified.
        precision: `fp32`, `fp16`, `bf16` or `int8`.
        ranges: for int8: largest absolute value of every tensor of `product_tensors`.
        keep_fp32: patterns as in a shell, of node names or of module names such as `stages.0.*`.

    Raises:
        InputError: a pattern matches nothing, or nothing is left to lower, or int8 lacks its ranges.
        VerificationError: a weight is beyond float16's range.
    """
    patterns = _Patterns(graph, keep_fp32)
    if precision == "fp32":
        return Lowered(graph, {}, ())
    if precision == "int8":
        if ranges is None:
            raise InputError("int8 needs calibration images: pass --calibration DIR|FILE.npz")
        lowered = _quantized(graph, ranges, patterns)
    else:
        lowered = _cast(graph, precision, patterns)
    if not any(op in PRODUCTS for op in lowered.lowered):
        raise InputError(f"--keep-fp32 leaves no product for {precision}; ask for --precision fp32")
    return lowered


def module_of(node: NodeProto) -> str:
    """The module a node is of: by the weights it reads, `stages.0.1.fc3`, or by the exporter's note; empty for none."""
    for name in node.input[1:]:
        if name.endswith((".weight", ".bias")):
            return str(name.rpartition(".")[0])
        if "." in name:
            return str(name)
    return _scope(node)


def _scope(node: NodeProto) -> str:
    """The innermost module in the exporter's note on a node."""
    scopes = _scopes(node)
    return scopes[-2] if len(scopes) > 1 else ""


def _scopes(node: NodeProto) -> list[str]:
    """The network, the modules inside it, the outermost first, and the operation."""
    noted = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    return [str(scope) for scope in ast.literal_eval(noted)]


def product_tensors(graph: onnx.ModelProto) -> tuple[str, ...]:
    """The tensors whose ranges int8 needs: what products with constant weights read, and what convolutions answer."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    products = [node for node in graph.graph.node if _is_product(node, weights)]
    names = [node.input[0] for node in products] + [node.output[0] for node in products if node.op_type == "Conv"]
    return tuple(dict.fromkeys(names))


def blocks_of(graph: onnx.ModelProto) -> dict[str, list[str]]:
    """Every block with products, and the names of all its nodes; `stages.0.1`: the outermost module in the network."""
    blocks: dict[str, list[str]] = {}
    with_products = set()
    for node in graph.graph.node:
        scopes = _scopes(node)
        block = scopes[1] if len(scopes) > _IN_A_MODULE else module_of(node).partition(".")[0]
        blocks.setdefault(block, []).append(node.name)
        if node.op_type in PRODUCTS:
            with_products.add(block)
    return {block: names for block, names in blocks.items() if block in with_products}


class _Patterns:
    """Which nodes a user wants kept in float32."""

    def __init__(self, graph: onnx.ModelProto, patterns: Sequence[str]) -> None:
        self._kept: set[str] = set()
        for pattern in patterns:
            found = {n.name for n in graph.graph.node if any(fnmatch.fnmatchcase(x, pattern) for x in _names_of(n))}
            if not found:
                modules = sorted({m for n in graph.graph.node if n.op_type in PRODUCTS and (m := module_of(n))})
                raise InputError(
                    f"--keep-fp32 {pattern} matches no node; modules are {', '.join(modules[:4])}, … {modules[-1]}"
                    if modules
                    else f"--keep-fp32 {pattern} matches no node"
                )
            self._kept |= found

    def __contains__(self, node: NodeProto) -> bool:
        return node.name in self._kept


def _names_of(node: NodeProto) -> Iterable[str]:
    """What a pattern may mean: the node, and its modules with everything they are inside of."""
    yield node.name
    for module in (module_of(node), _scope(node)):
        parts = module.split(".") if module else []
        for end in range(1, len(parts) + 1):
            yield ".".join(parts[:end])


def _is_product(node: NodeProto, weights: set[str]) -> bool:
    return node.op_type in PRODUCTS and len(node.input) > 1 and node.input[1] in weights


# fp16, bf16


@dataclass
class _Casting:
    """The graph under construction."""

    low: int
    types: dict[str, int]
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, TensorProto] = field(default_factory=dict)
    cast: dict[tuple[str, int], str] = field(default_factory=dict)

    def as_type(self, name: str, wanted: int) -> str:
        """The name of an activation in a type, cast at most once."""
        if self.types.get(name) in (wanted, None):
            return name
        if (name, wanted) not in self.cast:
            result = f"{name}_as_{TensorProto.DataType.Name(wanted).lower()}"
            self.nodes.append(helper.make_node("Cast", [name], [result], name=f"{result}_cast", to=wanted))
            self.cast[name, wanted] = result
        return self.cast[name, wanted]

    def weight_as(self, tensor: TensorProto, wanted: int) -> str:
        """The name of a float32 initializer in a type, converted at most once."""
        if wanted == TensorProto.FLOAT:
            self.weights[tensor.name] = tensor
            return str(tensor.name)
        name = f"{tensor.name}_{TensorProto.DataType.Name(wanted).lower()}"
        if name not in self.weights:
            self.weights[name] = _in_type(tensor, name, wanted)
        return name


def _cast(graph: onnx.ModelProto, precision: str, patterns: _Patterns) -> Lowered:
    """`graph` with everything that may be in the low type in it."""
    low = _LOW_TYPES[precision]
    floats = _float_tensors(graph)
    initializers = {tensor.name: tensor for tensor in graph.graph.initializer}
    work = _Casting(low, dict.fromkeys(floats, TensorProto.FLOAT))
    outputs = {value.name for value in graph.graph.output}
    counts: Counter[str] = Counter()
    kept = []
    for node in graph.graph.node:
        reason = _why_float32(node, precision, floats | initializers.keys(), patterns)
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
    opset = max(graph.opset_import[0].version, _BF16_OPSET if precision == "bf16" else 0)
    return Lowered(_rebuilt(graph, work.nodes, work.weights.values(), opset), dict(counts), tuple(kept))


def _why_float32(node: NodeProto, precision: str, floats: set[str], patterns: _Patterns) -> str:
    """Why a node stays in float32; empty where it need not."""
    if not any(name in floats for name in (*node.input, *node.output)):
        return ""
    if node in patterns:
        return _USER
    if node.op_type in _TYPED:
        return "its type is its own"
    return SENSITIVE.get(precision, {}).get(node.op_type, "")


SENSITIVE: dict[str, dict[str, str]] = {
    "fp16": {"ReduceMean": "a sum over a whole map may leave float16's range"},
}
"""Operators that stay in float32, with the reason."""


def _float_tensors(graph: onnx.ModelProto) -> set[str]:
    """Activations that are float32, inputs of the graph among them."""
    small = without_weights(graph, large_weights(graph), as_inputs=True)
    inferred = onnx.shape_inference.infer_shapes(small).graph
    weights = {tensor.name for tensor in graph.graph.initializer}
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT} - weights


def _in_type(tensor: TensorProto, name: str, wanted: int) -> TensorProto:
    """A float32 initializer in a low type.

    Raises:
        VerificationError: a value is beyond the type's range.
    """
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        low = values.astype(helper.tensor_dtype_to_np_dtype(wanted))
    if np.isfinite(values).all() and not np.isfinite(low.astype(np.float32)).all():
        raise VerificationError(
            f"{tensor.name} holds {float(np.abs(values).max()):.3g}, beyond float16's 65504: "
            f"pass --keep-fp32 '{tensor.name.rpartition('.')[0] or tensor.name}', or use bf16"
        )
    return TensorProto(name=name, data_type=wanted, dims=tensor.dims, raw_data=low.tobytes())


# int8


def _quantized(graph: onnx.ModelProto, ranges: Mapping[str, float], patterns: _Patterns) -> Lowered:
    """`graph` with a QuantizeLinear/DequantizeLinear pair around every product."""
    graph = with_pointwise_products(graph, lambda node: node not in patterns)
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    reasons = {node.output[0]: _why_not_int8(node, weights.keys(), patterns) for node in graph.graph.node}
    transposed = _transposed_for(graph.graph, lambda node: not reasons[node.output[0]])
    work = _Quantizing(ranges, weights, transposed)
    counts: Counter[str] = Counter()
    kept = []
    for node in graph.graph.node:
        if node.output[0] in transposed:
            continue
        if reason := reasons[node.output[0]]:
            work.keep(node)
            kept.append(Kept(node.name, node.op_type, module_of(node), reason))
        else:
            work.quantize(node)
            counts[node.op_type] += 1
    opset = graph.opset_import[0].version
    return Lowered(_rebuilt(graph, work.nodes, work.tensors.values(), opset), dict(counts), tuple(kept))


def _why_not_int8(node: NodeProto, weights: Iterable[str], patterns: _Patterns) -> str:
    """Why a node is not quantized; empty where it is."""
    if node.op_type not in PRODUCTS:
        return "no product: 8 bits would cost accuracy and save no arithmetic"
    if node in patterns:
        return _USER
    return "" if _is_product(node, set(weights)) else "its weights are no constant"


def _transposed_for(graph: onnx.GraphProto, is_quantized: Callable[[NodeProto], bool]) -> dict[str, NodeProto]:
    """What every transposition that quantized products alone read gives, to the transposition."""
    readers: dict[str, list[bool]] = {value.name: [False] for value in graph.output}
    for node in graph.node:
        for i, name in enumerate(node.input):
            readers.setdefault(name, []).append(i == 0 and is_quantized(node))
    transpositions = (node for node in graph.node if node.op_type == "Transpose")
    return {node.output[0]: node for node in transpositions if all(readers.get(node.output[0], [False]))}


class _Quantizing:
    """The graph under construction; `transposed` are transpositions that move behind QuantizeLinear."""

    def __init__(
        self, ranges: Mapping[str, float], weights: Mapping[str, TensorProto], transposed: Mapping[str, NodeProto]
    ) -> None:
        self._ranges, self._weights, self._transposed = ranges, weights, transposed
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self._quantized: set[str] = set()

    def keep(self, node: NodeProto) -> None:
        """Copy a node as it is."""
        self.nodes.append(node)
        self._use(node.input)

    def quantize(self, node: NodeProto) -> None:
        """Copy a product between its pairs. Every product has a DequantizeLinear of its own, as fusions want it."""
        made = NodeProto()
        made.CopyFrom(node)
        quantized, scale = self._quantized_activation(node.input[0])
        made.input[0] = self._add("DequantizeLinear", [quantized, *scale], f"{node.output[0]}_input")
        made.input[1] = self._weight(node)
        self._use(node.input[2:])
        self.nodes.append(made)
        if node.op_type == "Conv":
            self._quantize_output(made, node.output[0])

    def _quantized_activation(self, name: str) -> tuple[str, tuple[str, str]]:
        """The name of an activation in 8 bits, and of its scale and zero point."""
        transposition = self._transposed.get(name)
        source = name if transposition is None else transposition.input[0]
        scale = self._activation_scale(name if name in self._ranges else source)
        quantized = f"{name}_quantized"
        if name not in self._quantized:
            self._quantized.add(name)
            if transposition is None:
                self._add("QuantizeLinear", [name, *scale], quantized)
            else:
                made = NodeProto()
                made.CopyFrom(transposition)
                first = self._add("QuantizeLinear", [source, *scale], f"{name}_source_quantized")
                made.input[0] = self._add("DequantizeLinear", [first, *scale], f"{name}_source")
                self.nodes.append(made)
                self._add("QuantizeLinear", [name, *scale], quantized)  # rounds what is rounded: nothing changes
        return quantized, scale

    def _quantize_output(self, made: NodeProto, name: str) -> None:
        made.output[0] = f"{name}_exact"
        scale = self._activation_scale(name)
        rounded = self._add("QuantizeLinear", [made.output[0], *scale], f"{name}_rounded")
        self._add("DequantizeLinear", [rounded, *scale], name)

    def _add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}_{op}", **attributes))
        return output

    def _activation_scale(self, name: str) -> tuple[str, str]:
        """Names of the scale and the zero point of an activation."""
        if name not in self._ranges:
            raise InputError(f"calibration measured no range of {name}")
        return self._constants(name, np.float32(self._ranges[name]))

    def _constants(self, name: str, largest: NDArray[np.float32] | np.float32) -> tuple[str, str]:
        scale = np.maximum(np.asarray(largest, np.float32) / _INT8_MAX, np.finfo(np.float32).tiny)
        pair = (f"{name}_scale", f"{name}_zero_point")
        self.tensors[pair[0]] = numpy_helper.from_array(scale.astype(np.float32), pair[0])
        self.tensors[pair[1]] = numpy_helper.from_array(np.zeros(scale.shape, np.int8), pair[1])
        return pair

    def _weight(self, node: NodeProto) -> str:
        """The name of a product's dequantized weights."""
        name = node.input[1]
        result = f"{name}_dequantized"
        if f"{name}_int8" in self.tensors:
            return result
        values = numpy_helper.to_array(self._weights[name])
        axis = _output_axis(node, values.ndim)
        others = tuple(i for i in range(values.ndim) if i != axis) if axis is not None else None
        scale, zero = self._constants(name, np.abs(values).max(axis=others))
        factor = numpy_helper.to_array(self.tensors[scale])
        shape = [-1 if i == axis else 1 for i in range(values.ndim)] if axis is not None else []
        rounded = np.rint(values / factor.reshape(shape)).clip(-_INT8_MAX, _INT8_MAX).astype(np.int8)
        self.tensors[f"{name}_int8"] = numpy_helper.from_array(rounded, f"{name}_int8")
        attributes = {} if axis is None else {"axis": axis}
        return self._add("DequantizeLinear", [f"{name}_int8", scale, zero], result, **attributes)

    def _use(self, names: Iterable[str]) -> None:
        self.tensors |= {name: self._weights[name] for name in names if name in self._weights}


def _output_axis(node: NodeProto, rank: int) -> int | None:
    """The axis of a product's weights that counts its outputs; None where they have one scale."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return rank - 1 if rank <= _SINGLE_AXIS_RANK else None


def _rebuilt(
    graph: onnx.ModelProto, nodes: Sequence[NodeProto], weights: Iterable[TensorProto], opset: int
) -> onnx.ModelProto:
    """A model with the borders and metadata of `graph`."""
    made = helper.make_graph(nodes, graph.graph.name, graph.graph.input, graph.graph.output, list(weights))
    imports = [helper.make_opsetid(graph.opset_import[0].domain, opset), *graph.opset_import[1:]]
    model = helper.make_model(made, opset_imports=imports, ir_version=graph.ir_version, producer_name="repmlp-deploy")
    model.metadata_props.extend(graph.metadata_props)
    onnx.checker.check_model(without_weights(model, large_weights(model), as_inputs=True), full_check=True)
    return model
