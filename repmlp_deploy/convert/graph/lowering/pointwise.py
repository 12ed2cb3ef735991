"""Pairs of 1×1 convolutions with an activation between, as products over channels that are the last axis.

A 1×1 convolution maps every position alike: y[n, :, p] = W x[n, :, p] + b. With channels last that is one product for
all positions, (N, H, W, C) × (C, O) + b, and the same arithmetic:

    (N, C, H, W) → transposed → × W₁ᵀ + b₁ → activation → × W₂ᵀ + b₂ → transposed back.

In 8 bits this spares rounding between the product and the activation. An 8-bit convolution is one only with an 8-bit
result, which is unpacked for the activation and packed again for the next convolution; an 8-bit product may return
float32. That is two passes less over a map with four times the channels of any other, and one rounding less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from repmlp_deploy.errors import MissingDependency

try:
    import onnx
    from onnx import NodeProto, TensorProto, helper, numpy_helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["channels_last_values", "with_bias_added", "with_pointwise_products"]

_BETWEEN = ("Gelu", "Relu")
_KEEPING_AXES = ("MatMul", "Add", *_BETWEEN, "QuantizeLinear", "DequantizeLinear")
_CHANNELS_LAST, _CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_PRODUCT = "_product"  # after the name of a convolution's output: the product without its bias
_PLAIN = {
    "dilations": (1, 1),
    "group": 1,
    "kernel_shape": (1, 1),
    "pads": (0, 0, 0, 0),
    "strides": (1, 1),
    "auto_pad": b"NOTSET",
}
"""What a convolution's attributes must be to be a product over channels."""


def with_pointwise_products(graph: onnx.ModelProto, wanted: Callable[[NodeProto], bool]) -> onnx.ModelProto:
    """Return a copy of `graph` whose pairs of 1×1 convolutions are products; names stay.

    Weights are transposed, (O, C, 1, 1) -> (C, O).

    Args:
        graph: float32; left alone.
        wanted: whether a convolution may become a product.
    """
    initializers = {tensor.name: tensor for tensor in graph.graph.initializer}
    pairs = {pair.first.output[0]: pair for pair in _pairs(graph.graph, initializers, wanted)}
    if not pairs:
        return graph
    gone = {node.output[0] for pair in pairs.values() for node in (pair.first, pair.between, pair.second)}
    nodes: list[NodeProto] = []
    turned: dict[str, TensorProto] = {}
    for node in graph.graph.node:
        if node.output[0] in pairs:
            pair = pairs[node.output[0]]
            nodes += pair.as_products()
            for conv in (pair.first, pair.second):
                turned[conv.input[1]] = _transposed(initializers[conv.input[1]])
        elif node.output[0] not in gone:
            nodes.append(node)
    weights = [turned.get(tensor.name, tensor) for tensor in graph.graph.initializer]
    made = helper.make_graph(nodes, graph.graph.name, graph.graph.input, graph.graph.output, weights)
    model = helper.make_model(made, opset_imports=graph.opset_import, ir_version=graph.ir_version)
    model.metadata_props.extend(graph.metadata_props)
    return model


def channels_last_values(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the values that are (N, H, W, C) here and (N, C, H, W) in the network."""
    found: set[str] = set()
    for node in graph.node:
        if node.op_type == "Transpose":
            axes = tuple(helper.get_attribute_value(node.attribute[0])) if node.attribute else ()
            found |= {node.output[0]} if axes == _CHANNELS_LAST else set()
        elif node.op_type in _KEEPING_AXES and node.input[0] in found:
            found.add(node.output[0])
    return found


def with_bias_added(graph: onnx.GraphProto) -> dict[str, NodeProto]:
    """Map every product that was a convolution, by its output, to the node that gives the convolution's output."""
    return {node.input[0]: node for node in graph.node if node.op_type == "Add" and node.input[0].endswith(_PRODUCT)}


@dataclass(frozen=True)
class _Pair:
    """Two 1×1 convolutions, and the activation between them that nobody else reads."""

    first: NodeProto
    between: NodeProto
    second: NodeProto

    def as_products(self) -> Iterator[NodeProto]:
        """Return the nodes that replace the pair."""
        rows, last = f"{self.first.output[0]}_rows", f"{self.second.output[0]}_rows"
        activation = NodeProto()
        activation.CopyFrom(self.between)
        yield _transpose(self.first.input[0], rows, _CHANNELS_LAST, self.first)
        yield from _product(self.first, rows, activation.input[0])
        yield activation
        yield from _product(self.second, activation.output[0], last)
        yield _transpose(last, self.second.output[0], _CHANNELS_FIRST, self.second)


def _pairs(
    graph: onnx.GraphProto, initializers: Mapping[str, TensorProto], wanted: Callable[[NodeProto], bool]
) -> Iterator[_Pair]:
    reads = Counter(name for node in graph.node for name in node.input)
    reads.update(value.name for value in graph.output)
    readers = {name: node for node in graph.node for name in node.input}
    taken: set[str] = set()  # a convolution may be the second of one pair and the first of another

    def fits(node: NodeProto | None) -> bool:
        return (
            node is not None
            and node.output[0] not in taken
            and _is_pointwise(node, initializers)
            and reads[node.input[1]] == 1
            and wanted(node)
        )

    for first in graph.node:
        between = readers.get(first.output[0]) if reads[first.output[0]] == 1 else None
        if between is None or between.op_type not in _BETWEEN or reads[between.output[0]] != 1 or not fits(first):
            continue
        second = readers.get(between.output[0])
        if second is not None and fits(second):
            taken |= {first.output[0], second.output[0]}
            yield _Pair(first, between, second)


def _is_pointwise(node: NodeProto, initializers: Mapping[str, TensorProto]) -> bool:
    """Return whether a node is a product over channels: a plain 1×1 convolution with constant weights."""
    if node.op_type != "Conv" or node.input[1] not in initializers:
        return False
    if tuple(initializers[node.input[1]].dims)[2:] != (1, 1):
        return False
    return all(_plain(helper.get_attribute_value(a)) == _PLAIN[a.name] for a in node.attribute)


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _product(conv: NodeProto, source: str, result: str) -> Iterator[NodeProto]:
    """Return the source times Wᵀ, plus b, under the convolution's name."""
    biased = len(conv.input) > 2 and conv.input[2]  # noqa: PLR2004 - the third input is the bias
    product = conv.output[0] + _PRODUCT if biased else result
    made = helper.make_node("MatMul", [source, conv.input[1]], [product], name=conv.name)
    made.metadata_props.extend(conv.metadata_props)
    yield made
    if biased:
        added = helper.make_node("Add", [product, conv.input[2]], [result], name=f"{result}_bias")
        added.metadata_props.extend(conv.metadata_props)
        yield added


def _transpose(source: str, result: str, axes: tuple[int, ...], conv: NodeProto) -> NodeProto:
    made = helper.make_node("Transpose", [source], [result], name=f"{result}_transpose", perm=axes)
    made.metadata_props.extend(conv.metadata_props)
    return made


def _transposed(tensor: TensorProto) -> TensorProto:
    rows, columns = tensor.dims[:2]
    values = numpy_helper.to_array(tensor).reshape(rows, columns).T
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=(columns, rows), raw_data=values.tobytes())
