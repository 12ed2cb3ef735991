"""What a value is made of, and what computes with it, past nodes that only store or move."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset15 as ops

from repmlp_deploy.convert.formats.openvino_graph import constant_of, is_static, products, readers, weights_of


def test_weights_are_found_through_dequantization_and_only_if_they_are_constant() -> None:
    x = ops.parameter([-1, 4, 8], np.float32)
    codes = ops.constant(np.ones((4, 8, 2), np.int8))
    weights = ops.multiply(ops.convert(codes, np.float32), ops.constant(np.float32(0.5)))
    first = ops.matmul(x, weights, False, False)
    gated = ops.multiply(ops.constant(np.ones((1, 2, 1), np.float32)), ops.transpose(first, ops.constant([0, 2, 1])))
    second = ops.matmul(x, ops.transpose(gated, ops.constant([0, 2, 1])), True, False)
    found = products(ov.Model([second], [x]))
    assert [op.get_friendly_name() for op in found] == [first.get_friendly_name(), second.get_friendly_name()]
    assert weights_of(first).get_friendly_name() == codes.get_friendly_name()
    assert weights_of(second) is None
    assert is_static(first.input_value(1))
    assert not is_static(gated.output(0)), "one of two factors is computed"
    assert constant_of(weights.output(0)) is None, "a product is no storing"
    assert constant_of(weights.input_value(0)).get_friendly_name() == codes.get_friendly_name()


def test_readers_are_found_past_what_only_moves_values() -> None:
    x = ops.parameter([-1, 4], np.float32)
    moved = ops.reshape(x, ops.constant([-1, 2, 2]), False)
    model = ov.Model([ops.relu(ops.transpose(moved, ops.constant([0, 2, 1]))), ops.sigmoid(moved)], [x])
    assert {node.get_type_name() for node in readers(moved)} == {"Relu", "Sigmoid"}
    assert [node.get_type_name() for node in readers(model.get_results()[0].input_value(0).get_node())] == ["Relu"]
