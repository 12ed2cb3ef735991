"""Lowering by quantization.

**int8.** Explicit QuantizeLinear/DequantizeLinear pairs, symmetric (zero point 0), as TensorRT asks for: on the
activations of every product with constant weights, on the weights themselves, per output channel, and after every
convolution, without which ONNX Runtime computes it in float32. With ranges measured as ±r,

    x ≈ (r/127) · clip(round(127 x / r), −128, 127).

Pairs of 1×1 convolutions become products over channels first (`pointwise`), which need no pair after them: a fifth of
the whole network's time in ONNX Runtime. An activation that is only transposed for a product is quantized before
the transposition, which then moves a quarter of the bytes.

**fp8.** The same pairs with E4M3, whose largest value is 448: x ≈ (r/448) · fp8(448 x / r), rounded to three bits of
mantissa. A convolution needs no pair after it. ONNX Runtime takes the zero point for an integer's: it removes a Relu
before such a QuantizeLinear, as if values below zero were cut off there (seen in 1.32; outputs are off by their own
size). So every Relu is written as Max(x, 0).

**Biases.** ONNX Runtime makes the bias of a product int32, in units of the activation's scale times the weights'.
Where a channel's weights are nearly 0, as after a BatchNorm with γ = 0, its bias does not fit. So the weights of an
output have a scale in which its bias takes at most 2³⁰ units, and a range of 0 counts as 1.

Weights that two products read along different axes, as in a tied autoencoder, have one scale too: with one per output
of the first product, the second would sum over values of different scales. Each product has codes of its own: in
the precise mode of ONNX Runtime, which our sessions ask for, it fails where it meets the same codes again.

FC3 of several sharesets, (S, h·w, h·w), has one scale: DequantizeLinear takes scales along one axis, and ONNX Runtime
computes no batched product with those. (Bringing the sharesets to one range beforehand, exactly, by powers of two that
the block's own scale takes back, changed nothing on the networks tried.) The residual sums, gates and GELU between the
products stay in float32: only the copy that a product reads is quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.convert.graph.lowering.lowered import BY_PATTERN, PRODUCTS, Kept, Lowered, is_product, rebuild
from repmlp_deploy.convert.graph.lowering.names import lowered_name
from repmlp_deploy.convert.graph.lowering.pointwise import with_pointwise_products
from repmlp_deploy.convert.graph.nodes import module_of
from repmlp_deploy.errors import InputError, MissingDependency
from repmlp_deploy.precision import Precision

try:
    import ml_dtypes
    import onnx
    from onnx import NodeProto, TensorProto, helper, numpy_helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["quantize_graph"]

_SINGLE_AXIS_RANK = 2  # MatMul weights of other ranks have one scale
_LARGEST_BIAS = 2.0**30  # units of an int32 bias; as many again are left for the sum of products


def quantize_graph(
    graph: onnx.ModelProto, precision: Precision, ranges: Mapping[str, float], kept_names: AbstractSet[str]
) -> Lowered:
    """Return `graph` with a QuantizeLinear/DequantizeLinear pair around every product."""
    graph = with_pointwise_products(graph, lambda node: node.name not in kept_names)
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    reasons = {node.output[0]: _why_float32(node, weights.keys(), kept_names) for node in graph.graph.node}
    transposed = _transposed_for(graph.graph, lambda node: not reasons[node.output[0]])
    products = [node for node in graph.graph.node if not reasons[node.output[0]]]
    work = _Quantizing(precision, ranges, weights, transposed, _output_axes(products, weights))
    work.make_room(products, _biases(graph.graph, weights))
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
    opset = max(graph.opset_import[0].version, precision.min_opset)
    return Lowered(rebuild(graph, work.nodes, work.tensors.values(), opset), dict(counts), tuple(kept))


def _why_float32(node: NodeProto, weights: Iterable[str], kept_names: AbstractSet[str]) -> str:
    """Return why a node is not quantized; empty if it is."""
    if node.op_type not in PRODUCTS:
        return "no product: 8 bits would cost accuracy and save no arithmetic"
    if node.name in kept_names:
        return BY_PATTERN
    return "" if is_product(node, set(weights)) else "its weights are no constant"


def _transposed_for(graph: onnx.GraphProto, is_quantized: Callable[[NodeProto], bool]) -> dict[str, NodeProto]:
    """Map the output of every transposition that only quantized products read to its node."""
    readers: dict[str, list[bool]] = {value.name: [False] for value in graph.output}
    for node in graph.node:
        for i, name in enumerate(node.input):
            readers.setdefault(name, []).append(i == 0 and is_quantized(node))
    transpositions = (node for node in graph.node if node.op_type == "Transpose")
    return {node.output[0]: node for node in transpositions if all(readers.get(node.output[0], [False]))}


def _biases(graph: onnx.GraphProto, weights: Mapping[str, TensorProto]) -> dict[str, str]:
    """Map the output of every product to the name of its constant bias: its own, or what the next node adds."""
    found = {node.output[0]: node.input[2] for node in graph.node if node.op_type in PRODUCTS and len(node.input) > 2}  # noqa: PLR2004 - x, weights, bias
    for node in graph.node:
        for value, other in (node.input, reversed(node.input)) if node.op_type == "Add" else ():
            found.setdefault(value, other)
    return {value: bias for value, bias in found.items() if bias in weights}


class _Quantizing:
    """The graph under construction.

    `transposed` are transpositions that move after QuantizeLinear, `axes` those along which weights have their scales.
    """

    def __init__(
        self,
        precision: Precision,
        ranges: Mapping[str, float],
        weights: Mapping[str, TensorProto],
        transposed: Mapping[str, NodeProto],
        axes: Mapping[str, int | None],
    ) -> None:
        kind = TensorProto.DataType.Value(precision.onnx_type)
        self._kind, self._codes = kind, helper.tensor_dtype_to_np_dtype(kind)
        self._is_integer = bool(np.issubdtype(self._codes, np.integer))
        self._largest = float((np.iinfo if self._is_integer else ml_dtypes.finfo)(self._codes).max)  # 127 or 448
        self._ranges, self._weights, self._transposed, self._axes = ranges, weights, transposed, axes
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self._quantized: set[str] = set()
        self._room: dict[str, NDArray[np.float32]] = {}

    def make_room(self, products: Iterable[NodeProto], biases: Mapping[str, str]) -> None:
        """Find the range that weights need at least for the biases of their products to fit int32, per output."""
        for node in products if self._is_integer else ():
            weight = self._weights[node.input[1]]
            axis, source = self._axes[weight.name], self._source(node.input[0])
            if node.output[0] not in biases or source not in self._ranges:
                continue
            bias = np.abs(numpy_helper.to_array(self._weights[biases[node.output[0]]])).reshape(-1)
            scale = numpy_helper.to_array(self.tensors[self._activation_scale(source)[0]])
            least = (bias / (scale * _LARGEST_BIAS) * self._largest).astype(np.float32)
            if axis is None or len(least) not in (1, weight.dims[axis]):
                least = least.max(initial=0)
            self._room[weight.name] = np.maximum(self._room.get(weight.name, np.float32(0)), least)

    def keep(self, node: NodeProto) -> None:
        """Copy a node; a Relu before 8-bit floats becomes the maximum with zero, see the module's text."""
        if node.op_type == "Relu" and not self._is_integer:
            zero = f"{node.output[0]}_zero"
            self.tensors[zero] = numpy_helper.from_array(np.zeros((), np.float32), zero)
            made = helper.make_node("Max", [node.input[0], zero], node.output, name=node.name)
            made.metadata_props.extend(node.metadata_props)
            node = made
        self.nodes.append(node)
        self._use(node.input)

    def quantize(self, node: NodeProto) -> None:
        """Copy a product between its pairs. Every product has a DequantizeLinear of its own, as fusions need."""
        made = NodeProto()
        made.CopyFrom(node)
        quantized, scale = self._quantized_activation(node.input[0])
        made.input[0] = self._add("DequantizeLinear", [quantized, *scale], f"{node.output[0]}_input")
        made.input[1] = self._weight(node)
        self._use(node.input[2:])
        self.nodes.append(made)
        if node.op_type == "Conv" and self._is_integer:
            self._quantize_output(made, node.output[0])

    def _quantized_activation(self, name: str) -> tuple[str, tuple[str, str]]:
        """Return the name of an activation in 8 bits, and of its scale and zero point."""
        transposition = self._transposed.get(name)
        source = name if transposition is None else transposition.input[0]
        scale = self._activation_scale(self._source(name))
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

    def _source(self, name: str) -> str:
        """Return the name under which an activation's range was measured."""
        return name if name in self._ranges or name not in self._transposed else self._transposed[name].input[0]

    def _quantize_output(self, made: NodeProto, name: str) -> None:
        made.output[0] = f"{name}_exact"
        scale = self._activation_scale(name)
        rounded = self._add("QuantizeLinear", [made.output[0], *scale], f"{name}_rounded")
        self._add("DequantizeLinear", [rounded, *scale], name)

    def _add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}_{op}", **attributes))
        return output

    def _activation_scale(self, name: str) -> tuple[str, str]:
        """Return names of the scale and the zero point of an activation."""
        if name not in self._ranges:
            raise InputError(f"calibration measured no range of {name}")
        return self._constants(name, np.float32(self._ranges[name]))

    def _constants(self, name: str, largest: NDArray[np.float32] | np.float32) -> tuple[str, str]:
        largest = np.where(np.asarray(largest, np.float32) == 0, np.float32(1), largest)
        scale = np.maximum(largest / self._largest, np.finfo(np.float32).tiny)
        pair = (f"{name}_scale", f"{name}_zero_point")
        self.tensors[pair[0]] = numpy_helper.from_array(scale.astype(np.float32), pair[0])
        self.tensors[pair[1]] = self._stored(np.zeros(scale.shape, np.float32), pair[1])
        return pair

    def _weight(self, node: NodeProto) -> str:
        """Return the name of a product's dequantized weights."""
        name = node.input[1]
        result, stored = f"{name}_dequantized", lowered_name(name, TensorProto.DataType.Name(self._kind))
        if stored in self.tensors:
            return self._copied_weight(name, stored, node.output[0])
        values = numpy_helper.to_array(self._weights[name])
        axis = self._axes[name]
        others = tuple(i for i in range(values.ndim) if i != axis) if axis is not None else None
        largest = np.maximum(np.abs(values).max(axis=others), self._room.get(name, np.float32(0)))
        scale, zero = self._constants(name, largest)
        factor = numpy_helper.to_array(self.tensors[scale])
        shape = [-1 if i == axis else 1 for i in range(values.ndim)] if axis is not None else []
        self.tensors[stored] = self._stored(values / factor.reshape(shape), stored)
        attributes = {} if axis is None else {"axis": axis}
        return self._add("DequantizeLinear", [stored, scale, zero], result, **attributes)

    def _copied_weight(self, name: str, stored: str, output: str) -> str:
        """Return the name of dequantized weights that another product has as well, from codes of their own."""
        axis, own = self._axes[name], f"{output}_{name}"
        names = [f"{own}_codes", f"{own}_zero_point"]
        for shared, copied in zip((stored, f"{name}_zero_point"), names, strict=True):
            self.tensors[copied] = TensorProto()
            self.tensors[copied].CopyFrom(self.tensors[shared])
            self.tensors[copied].name = copied
        attributes = {} if axis is None else {"axis": axis}
        inputs = [names[0], f"{name}_scale", names[1]]
        return self._add("DequantizeLinear", inputs, f"{own}_dequantized", **attributes)

    def _stored(self, values: NDArray[np.float32], name: str) -> TensorProto:
        """Return values in units of their scale, each as the nearest code."""
        exact = values.clip(-self._largest, self._largest)
        codes = (np.rint(exact) if self._is_integer else exact).astype(self._codes)
        return TensorProto(name=name, data_type=self._kind, dims=codes.shape, raw_data=codes.tobytes())

    def _use(self, names: Iterable[str]) -> None:
        self.tensors |= {name: self._weights[name] for name in names if name in self._weights}


def _output_axes(products: Iterable[NodeProto], weights: Mapping[str, TensorProto]) -> dict[str, int | None]:
    """Return the axis of every product's weights that counts outputs; None if they have one scale.

    Weights that several products read along different axes, as those of a tied autoencoder, have one scale too.
    """
    axes: dict[str, int | None] = {}
    for node in products:
        name = node.input[1]
        axis = _output_axis(node, len(weights[name].dims))
        axes[name] = axis if axes.get(name, axis) == axis else None
    return axes


def _output_axis(node: NodeProto, rank: int) -> int | None:
    """Return the axis of a product's weights that counts its outputs; None if they have one scale."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return rank - 1 if rank == _SINGLE_AXIS_RANK else None
