"""Walking an OpenVINO model: what its products are, what a value is made of, and what computes with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from repmlp_deploy.errors import MissingDependency

try:
    import onnx
except ImportError:
    raise MissingDependency("onnx", "export") from None
try:
    import openvino as ov
    from openvino import opset15 as ops
except ImportError:
    raise MissingDependency("openvino", "openvino") from None

__all__ = ["PRODUCTS", "constant_of", "is_static", "products", "readers", "weights_of", "with_all_inputs"]

PRODUCTS = ("Convolution", "GroupConvolution", "MatMul")
"""Operations that hold nearly all of a network's bytes and arithmetic, if their weights are constant."""

_MOVING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "ShapeOf")
_STORING = ("Convert", "Reshape")
_DEQUANTIZING = (*_STORING, "Multiply", "Subtract", "FakeQuantize")


def with_all_inputs(model: Any, graph: bytes, names: Sequence[str]) -> Any:
    """Return a model with every input of the ONNX graph it was read from: OpenVINO drops those that nothing reads.

    Args:
        model: as it was read.
        graph: the ONNX model.
        names: of all inputs, in the order in which they are given.
    """
    found = {name: port.get_node() for port in model.inputs for name in port.get_names()}
    if found.keys() >= set(names):
        return model
    for value in onnx.load_from_string(graph).graph.input:
        if value.name not in found:
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            unread = ops.parameter([-1] * len(value.type.tensor_type.shape.dim), kind, value.name)
            unread.output(0).get_tensor().set_names({value.name})
            found[value.name] = unread
    return ov.Model(model.get_results(), [found[name] for name in names], model.get_friendly_name())


def products(model: Any) -> list[Any]:
    """Return the model's products, in the order in which they run."""
    return [op for op in model.get_ordered_ops() if op.get_type_name() in PRODUCTS]


def weights_of(product: Any) -> Any:
    """Return the Constant that a product multiplies by, through decompression or dequantization; None without one."""
    return _constant_behind(product.input_value(1), _DEQUANTIZING)


def constant_of(value: Any) -> Any:
    """Return the Constant that a value is made of by storing and reshaping; None if there is another source."""
    return _constant_behind(value, _STORING)


def is_static(value: Any) -> bool:
    """Return whether nothing but constants makes a value."""
    node = value.get_node()
    sources = node.input_values()
    return node.get_type_name() == "Constant" or (bool(sources) and all(map(is_static, sources)))


def readers(node: Any) -> Iterator[Any]:
    """Yield the nodes that compute with what a node gives: itself, or what follows if it only moves values."""
    if node.get_type_name() not in _MOVING:
        yield node
        return
    for port in node.output(0).get_target_inputs():
        yield from readers(port.get_node())


def _constant_behind(value: Any, kinds: tuple[str, ...]) -> Any:
    """Return the Constant behind nodes of some kinds, along their first inputs; None if another node is there."""
    node = value.get_node()
    while node.get_type_name() in kinds:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None
