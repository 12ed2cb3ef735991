"""What a value is made of, and what computes with it, past nodes that only store or move."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from onnx import TensorProto, helper
from openvino import opset15 as ops

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.formats.openvino import build_ir
from repmlp_deploy.convert.formats.openvino_graph import constant_of, is_static, products, readers, weights_of
from repmlp_deploy.runtime.openvino.runner import CompiledIR
from repmlp_deploy.runtime.runner import RunnerOptions


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


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_input_that_nothing_reads_is_kept_in_its_place(precision: str) -> None:
    """OpenVINO's reader drops it; a caller gives it all the same."""
    kinds = {"unread": (TensorProto.INT64, [3]), "x": (TensorProto.FLOAT, [4])}
    inputs = [helper.make_tensor_value_info(name, kind, ["n", *edges]) for name, (kind, edges) in kinds.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).ravel())
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
    graph = helper.make_graph([product], "g", inputs, [output], [weights])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    ir = build_ir(
        made.SerializeToString(),
        precision=precision,
        batch=BatchRange(min=1, opt=2, max=4),
        inputs={"unread": (3,), "x": (4,)},
        calibration=[{"unread": np.zeros((1, 3), np.int64), "x": np.full((1, 4), 2.0, np.float32)}],
    )
    model = CompiledIR(lambda: (ir.xml, ir.weights), precision, RunnerOptions(threads=1))
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(model.run_all(np.zeros((2, 3), np.int64), x)[0], x, rtol=0.02)
