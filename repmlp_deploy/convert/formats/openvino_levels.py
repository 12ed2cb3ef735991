"""Where the activations of a quantized OpenVINO model have 8 bits: only where a CPU is faster for it.

NNCF lets every input of an operation that can be quantized have 8 bits. Two kinds of them cost time:

* **Between elementwise operations**, as around the gates of a global perceptron, nothing computes with the 8 bits: they
  are converted back at once. Without them the operations fuse as well, and are closer to the trained network. What a
  product gives keeps its 8 bits, since it is written to memory, unless it has one point a channel.
* **With a zero point, before a product that is batched over its weights**, as FC3 of several sharesets, a pass of its
  own over the result in float32 takes away what the zero point adds. Levels on both sides of 0 need no such pass. They
  are coarser where values lie mostly on one side: ranges whose levels would be coarser by more than half stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from repmlp_deploy.convert.formats.openvino_graph import PRODUCTS, constant_of, is_static, readers
from repmlp_deploy.errors import MissingDependency

try:
    from openvino import opset15 as ops
except ImportError:
    raise MissingDependency("openvino", "openvino") from None

__all__ = ["arrange_levels"]

_ELEMENTWISE = frozenset({"Add", "Multiply", "Subtract"})
_ACTIVATIONS = ("Clamp", "Elu", "Gelu", "HSigmoid", "HSwish", "PRelu", "Relu", "Sigmoid", "Swish", "Tanh")
_BATCHED = 3  # axes of weights that are batched
_COARSER = 1.5  # times, at most, that levels on both sides of 0 may be


def arrange_levels(model: Any) -> None:
    """Remove 8 bits between elementwise operations and zero points before batched products; changes `model`."""
    for op in model.get_ordered_ops():
        if op.get_type_name() != "FakeQuantize":
            continue
        reading = [node for port in op.output(0).get_target_inputs() for node in readers(port.get_node())]
        is_elementwise = bool(reading) and all(node.get_type_name() in _ELEMENTWISE for node in reading)
        if is_elementwise and (_is_point(op) or not _ends_a_product(op.input_value(0).get_node())):
            for port in op.output(0).get_target_inputs():
                port.replace_source_output(op.input_value(0))
        elif any(map(_is_batched_product, reading)):
            _centre(op)
    model.validate_nodes_and_infer_types()


def _is_point(op: Any) -> bool:
    """Return whether a value is (N, C) or (N, C, 1, …): so few numbers that 8 bits save nothing."""
    return all(str(edge) == "1" for edge in list(op.get_output_partial_shape(0))[2:])


def _ends_a_product(node: Any) -> bool:
    """Return whether a node is a product or what fuses into one: activations, biases and scales."""
    while node.get_type_name() not in PRODUCTS:
        sources = node.input_values()
        if node.get_type_name() in _ELEMENTWISE:
            computed = [value for value in sources if constant_of(value) is None]
            if len(computed) != 1:
                return False
            node = computed[0].get_node()
        elif node.get_type_name() in _ACTIVATIONS:
            node = sources[0].get_node()
        else:
            return False
    return True


def _is_batched_product(node: Any) -> bool:
    """Return whether a node is a MatMul by constant weights of several matrices, (S, K, O)."""
    if node.get_type_name() != "MatMul":
        return False
    weights = node.input_value(1)
    return is_static(weights) and len(weights.get_partial_shape()) >= _BATCHED


def _centre(op: Any) -> None:
    """Give a FakeQuantize of 256 levels the same number of them below 0 as from 0 on, unless they are too coarse."""
    low, high = (op.input_value(i).get_node() for i in (1, 2))
    if low.get_type_name() != "Constant" or low.data.size != 1 or op.get_attributes()["levels"] != 256:  # noqa: PLR2004
        return
    smallest, largest = float(low.data.item()), float(high.data.item())
    reach = max(-smallest, largest * 128 / 127)
    if smallest >= 0 or 2 * reach > _COARSER * (largest - smallest):
        return
    ends = [ops.constant(np.full(low.data.shape, end, np.float32)) for end in (-reach, reach * 127 / 128)]
    for i, end in enumerate([*ends, *ends], 1):
        op.input(i).replace_source_output(end.output(0))
