"""int8 products on CPUs that add them in 16 bits, and weights that such CPUs get right."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from openvino import opset15 as ops

from repmlp_deploy.runtime.onnx.runner import open_session
from repmlp_deploy.runtime.openvino.int8 import Int8Kernels, fit_weights, int8_kernels
from repmlp_deploy.runtime.runner import RunnerOptions

EXACT = Int8Kernels(full_range=True, scale_per_batch=True)
NARROW = Int8Kernels(full_range=False, scale_per_batch=True)
ONE_SCALE = Int8Kernels(full_range=True, scale_per_batch=False)
WORST = Int8Kernels(full_range=False, scale_per_batch=False)


def codes_of(shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Random weights with the largest among them."""
    codes = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    codes.flat[0] = 127
    return codes


def product(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> ov.Model:
    """Inputs in [0, 2], quantized, times batched weights (G, K, N)."""
    groups, length, _ = codes.shape
    given = ops.parameter([groups, -1, length], np.float32, name="x")
    low, high = np.float32(0), np.float32(2)
    levels = ops.fake_quantize(given, low, high, low, high, 256)
    weights = ops.multiply(ops.convert(ops.constant(codes), np.float32), ops.constant(scales))
    return ov.Model([ops.matmul(levels, weights, False, False)], [given])


def convolution(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> ov.Model:
    """Inputs (N, C, H, W) times weights (O, C, 1, 1)."""
    given = ops.parameter([-1, codes.shape[1], 4, 4], np.float32, name="x")
    weights = ops.multiply(ops.convert(ops.constant(codes), np.float32), ops.constant(scales))
    return ov.Model([ops.convolution(given, weights, [1, 1], [0, 0], [0, 0], [1, 1])], [given])


def constants(model: ov.Model) -> Mapping[str, NDArray[np.float32]]:
    """Weights and scale, by their types."""
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    multiply = next(node for node in model.get_ordered_ops() if node.get_type_name() == "Multiply")
    scale = multiply.input_value(1).get_node().get_data()
    codes = next(node.get_data() for node in found if node.get_element_type() == ov.Type.i8)
    return {"codes": codes, "scale": scale}


def test_nothing_changes_for_kernels_that_are_right() -> None:
    model = product(codes_of((2, 8, 8)), np.ones((2, 1, 8), np.float32))
    assert fit_weights(model, EXACT) == 0


def test_weights_of_8_bits_become_7_and_keep_their_values() -> None:
    codes, scales = codes_of((2, 8, 8)), np.linspace(0.5, 2, 16, dtype=np.float32).reshape(2, 1, 8)
    model = product(codes, scales)
    assert fit_weights(model, NARROW) == 1
    fresh = constants(model)
    assert np.abs(fresh["codes"].astype(int)).max() == 64
    assert np.abs(fresh["codes"] * fresh["scale"] - codes * scales).max() <= 0.5001 * fresh["scale"].max()
    assert fit_weights(model, NARROW) == 0  # they fit


def test_batched_weights_get_one_scale_per_column() -> None:
    codes, scales = codes_of((2, 8, 8)), np.linspace(0.5, 2, 16, dtype=np.float32).reshape(2, 1, 8)
    model = product(codes, scales)
    assert fit_weights(model, ONE_SCALE) == 1
    fresh = constants(model)
    assert (fresh["scale"][0] == fresh["scale"][1]).all()
    assert (fresh["scale"][0] == scales.max(axis=0)).all()
    assert np.abs(fresh["codes"] * fresh["scale"] - codes * scales).max() <= 0.5001 * scales.max()


def test_channels_of_a_convolution_keep_their_scales() -> None:
    codes, scales = codes_of((8, 4, 1, 1)), np.linspace(0.5, 2, 8, dtype=np.float32).reshape(8, 1, 1, 1)
    model = convolution(codes, scales)
    assert fit_weights(model, ONE_SCALE) == 0
    assert fit_weights(model, NARROW) == 1
    assert np.allclose(constants(model)["scale"], scales * 127 / 64)


@pytest.mark.parametrize("same_scale", [True, False])
def test_fitted_weights_are_computed_right_on_this_cpu(*, same_scale: bool) -> None:
    """With inputs that are all large, sums of pairs go far beyond 16 bits where weights have 8."""
    codes = np.abs(codes_of((2, 64, 16)))
    scales = np.ones((2, 1, 16), np.float32) * ([[[1]], [[1]]] if same_scale else [[[1]], [[3]]])
    model = product(codes, scales.astype(np.float32))
    fit_weights(model, int8_kernels())
    fresh = constants(model)
    inputs = np.random.default_rng(1).integers(200, 256, (2, 5, 64)) * np.float32(2 / 255)
    expected = inputs.astype(np.float64) @ (fresh["codes"] * fresh["scale"].astype(np.float64))
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.allclose(compiled([inputs.astype(np.float32)])[0], expected, rtol=1e-3)


def test_what_a_cpu_gets_wrong_is_said() -> None:
    assert EXACT.describe() == ""
    assert "7 bits" in NARROW.describe()
    assert "one scale" in ONE_SCALE.describe()
    assert WORST.describe() == f"{NARROW.describe()}; {ONE_SCALE.describe()}"


def test_onnx_runtime_cuts_no_sum_off() -> None:
    """Without its precision mode, a CPU that lacks VNNI cuts this product off."""
    length = 64
    weights = np.full((length, 8), 127, np.int8)
    one, zero = np.float32(1), np.int8(0)
    tensors = [
        numpy_helper.from_array(weights, "w"),
        numpy_helper.from_array(np.asarray(one), "s"),
        numpy_helper.from_array(np.asarray(zero), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, length])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 8])
    graph = helper.make_graph(nodes, "product", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    inputs = np.full((3, length), 127, np.float32)
    session, _ = open_session(model.SerializeToString(), RunnerOptions(device="cpu"))
    assert (session.run(None, {"x": inputs})[0] == 127 * 127 * length).all()
