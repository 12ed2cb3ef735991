"""Emulation rounds where ONNX Runtime's CPU provider does not."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from repmlp_deploy.convert.graph.emulate import emulate

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def product(precision: str) -> onnx.ModelProto:
    """x · 1000 / 1000 between Casts to a precision and back."""
    kind = TYPES[precision]
    weights = [helper.make_tensor(name, kind, [1], [value]) for name, value in (("up", 1000.0), ("down", 0.001))]
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=kind),
        helper.make_node("Mul", ["low", "up"], ["large"]),
        helper.make_node("Mul", ["large", "down"], ["small"]),
        helper.make_node("Cast", ["small"], ["y"], to=TensorProto.FLOAT),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "product", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_what_overflows_in_fp16_overflows_when_emulated_and_not_on_a_cpu() -> None:
    x = np.float32([20, 100])
    assert np.isfinite(run(product("fp16"), x)).all()
    emulated = run(emulate(product("fp16"), "fp16"), x)
    assert emulated[0] == pytest.approx(20, rel=2e-3)
    assert np.isinf(emulated[1])


def test_bf16_has_the_range_of_float32_and_rounds_coarsely() -> None:
    x = np.float32([20.0625, 1e30])
    emulated = run(emulate(product("bf16"), "bf16"), x)
    np.testing.assert_allclose(emulated, x, rtol=2e-2)
    assert abs(emulated[0] - x[0]) > 1e-3


def test_the_graph_is_left_alone() -> None:
    model = product("fp16")
    before = model.SerializeToString(deterministic=True)
    emulate(model, "fp16")
    assert model.SerializeToString(deterministic=True) == before
