"""Activations have 8 bits where a product reads them, or writes them; batched products read levels around 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as ops

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.formats.openvino import quantize_ir
from repmlp_deploy.convert.formats.openvino_levels import arrange_levels
from support.digit_cases import exported, scans


def levels(value: Any, low: float, high: float) -> Any:
    ends = np.float32(low), np.float32(high)
    return ops.fake_quantize(value, *ends, *ends, 256)


def batched(low: float, high: float, matrices: int = 2) -> tuple[ov.Model, Any]:
    """Return a model of one product (S, N, 8) × (S, 8, 4), and the FakeQuantize before it."""
    x = ops.parameter([-1, matrices, 8], np.float32)
    fq = levels(x, low, high)
    rows = ops.transpose(fq, ops.constant([1, 0, 2]))
    codes = np.random.default_rng(0).integers(-127, 128, (matrices, 8, 4), np.int8)
    weights = ops.multiply(ops.convert(ops.constant(codes), np.float32), ops.constant(np.float32(0.01)))
    return ov.Model([ops.matmul(rows, weights, False, False)], [x]), fq


def ends(fq: Any) -> list[float]:
    return [fq.input_value(i).get_node().data.item() for i in range(1, 5)]


@pytest.mark.parametrize(("low", "high", "reach"), [(-3.0, 7.0, 7 * 128 / 127), (-7.0, 3.0, 7.0), (-1.0, 5.0, None)])
def test_a_batched_product_reads_levels_around_0_unless_they_are_far_coarser(
    low: float, high: float, reach: float | None
) -> None:
    model, fq = batched(low, high)
    arrange_levels(model)
    expected = [low, high] * 2 if reach is None else [-reach, reach * 127 / 128] * 2
    assert ends(fq) == pytest.approx(expected)


def test_values_that_are_never_negative_keep_their_levels() -> None:
    model, fq = batched(0.0, 5.0)
    arrange_levels(model)
    assert ends(fq) == [0, 5, 0, 5]


def test_no_levels_are_left_between_elementwise_operations() -> None:
    """Those that a product writes stay, unless it is one point a channel, as of a gate."""
    x, gate = (ops.parameter([-1, 8, *edges], np.float32) for edges in ((4, 4), (1, 1)))
    kernel = ops.constant(np.ones((8, 8, 1, 1), np.float32))
    strides = [1, 1], [0, 0], [0, 0], [1, 1]
    written = levels(ops.relu(ops.convolution(levels(x, 0, 1), kernel, *strides)), 0, 8)
    written.set_friendly_name("written")
    opened = levels(ops.sigmoid(ops.convolution(levels(gate, 0, 1), kernel, *strides)), 0, 1)
    shifted = levels(ops.add(written, ops.constant(np.float32(0.5))), 0, 9)
    read = levels(ops.multiply(shifted, opened), 0, 9)
    read.set_friendly_name("read")
    model = ov.Model([ops.convolution(read, kernel, *strides)], [x, gate])
    arrange_levels(model)
    left = [op for op in model.get_ordered_ops() if op.get_type_name() == "FakeQuantize"]
    assert {op.get_friendly_name() for op in left} >= {"written", "read"}
    assert len(left) == 4  # and one before each of the first two convolutions


def test_digits_keep_levels_only_beside_products(tmp_path: Path) -> None:
    exported("repmlp-digits", tmp_path / "out", "fp32")
    graph = (tmp_path / "out" / "model.onnx").read_bytes()
    feeds = [{"images": sample[None]} for sample in scans("repmlp-digits", 16, held_out=False)[0]]
    ir = quantize_ir(
        graph, "int8", batch=BatchRange(min=1, opt=8, max=64), inputs={"images": (3, 32, 32)}, calibration=feeds
    )(())
    model = ov.Core().read_model(ir.xml, ir.weights)
    names = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() == "FakeQuantize"]
    assert any("ffn" in name for name in names)
    assert not [name for name in names if "offset" in name or "scale" in name or "Sigmoid" in name]
