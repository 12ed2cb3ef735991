"""Nodes of a quantized OpenVINO model back in float32, without another quantization.

A node computes in int8 because FakeQuantize stands before what it reads, and because its constants were replaced. So a
node is back in float32 when what reads it is connected past the FakeQuantize, and its constants are the float32
model's again. Between a FakeQuantize and a node may lie reshapes and transpositions, which only move values: each way
out of a FakeQuantize is connected past it if all that lies at its ends is to be float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from repmlp_deploy.convert.formats.openvino_graph import constant_of, is_static, readers

__all__ = ["with_float_nodes"]


def with_float_nodes(quantized: Any, floats: Any, is_float: Callable[[Any], bool]) -> Any:
    """Return a copy of a quantized model with some nodes in float32.

    Args:
        quantized: the model; it does not change.
        floats: the model that was quantized.
        is_float: whether a node is to be in float32.
    """
    model = quantized.clone()
    before = {op.get_friendly_name(): op for op in floats.get_ordered_ops()}
    for op in model.get_ordered_ops():
        if op.get_type_name() == "FakeQuantize":
            for port in op.output(0).get_target_inputs():
                if all(is_float(reader) for reader in readers(port.get_node())):
                    port.replace_source_output(op.input_value(0))
        elif is_float(op) and op.get_friendly_name() in before:
            _restore_constants(op, before[op.get_friendly_name()])
    model.validate_nodes_and_infer_types()
    return model


def _restore_constants(op: Any, before: Any) -> None:
    """Let a node read the constants that it read before: weights, and the bias, which quantization corrects."""
    for port, value in zip(op.inputs(), before.input_values(), strict=True):
        if port.get_source_output().get_node().get_type_name() == "FakeQuantize":
            continue  # an activation, or weights whose way to here is no chain of constants
        original = constant_of(value)
        if original is None:
            continue
        if is_static(value):
            port.replace_source_output(value)
        else:  # a bias that is brought to the rank of a map, which the graph asks for while it runs
            port.get_source_output().get_node().input(0).replace_source_output(original.output(0))
