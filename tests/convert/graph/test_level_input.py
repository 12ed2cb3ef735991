"""A graph that takes 8-bit images, against the graph that takes what preprocessing makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from repmlp_deploy.card import Preprocessing
from repmlp_deploy.convert.graph.level_input import with_level_input
from repmlp_deploy.convert.graph.run import onnx_run
from repmlp_deploy.runtime.images import levels_of, normalised

RGB = Preprocessing(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
BGR = Preprocessing(mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395), colour_order="BGR")
GRAY = Preprocessing(mean=(78.0,), std=(96.0,))
FOUR = Preprocessing(mean=(10.0, 20.0, 30.0, 40.0), std=(50.0, 60.0, 70.0, 80.0))


def levels(channels: int) -> NDArray[np.uint8]:
    """Return images with every level, the extremes at the border among them."""
    found = np.random.default_rng(0).integers(0, 256, (3, 8, 12, channels), dtype=np.uint8)
    found[0, 0], found[0, -1] = 0, 255
    return found


def graph(channels: int, *, bias: bool = True, **attributes: object) -> onnx.ModelProto:
    """Return a convolution of kernel 4, and what comes after it."""
    rng = np.random.default_rng(1)
    tensors = [numpy_helper.from_array(rng.standard_normal((5, channels, 4, 4), np.float32), "w")]
    tensors += [numpy_helper.from_array(rng.standard_normal(5, np.float32), "b")] if bias else []
    inputs = ["images", "w", "b"] if bias else ["images", "w"]
    nodes = [
        helper.make_node("Conv", inputs, ["y"], name="embedding/Conv", **{"strides": [4, 4], **attributes}),
        helper.make_node("Relu", ["y"], ["out"], name="Relu"),
    ]
    return model(nodes, tensors, channels)


def model(nodes: list[onnx.NodeProto], tensors: list[TensorProto], channels: int) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", channels, 8, 12])
    y = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    made = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def outputs(made: onnx.ModelProto, batch: NDArray[np.generic]) -> NDArray[np.float32]:
    return onnx_run(made.SerializeToString())(batch)[0]


@pytest.mark.parametrize("how", [RGB, BGR, GRAY, FOUR], ids=["rgb", "bgr", "gray", "bands"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_unpadded_convolution_holds_the_normalisation(how: Preprocessing, *, bias: bool) -> None:
    """Only rounding is left: a wrong channel, mean or bias is a thousand times as large."""
    taken = graph(how.channels, bias=bias)
    made, note = with_level_input(taken, how)
    assert "folded into the first convolution" in note
    assert [node.op_type for node in made.graph.node] == ["Cast", "Transpose", "Sub", "Conv", "Relu"]
    shape = made.graph.input[0].type.tensor_type
    assert shape.elem_type == TensorProto.UINT8
    assert [edge.dim_param or edge.dim_value for edge in shape.shape.dim] == ["batch", 8, 12, how.channels]
    u = levels(how.channels)
    expected = outputs(taken, normalised(u, how))
    np.testing.assert_allclose(outputs(made, u), expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("how", [RGB, BGR, GRAY], ids=["rgb", "bgr", "gray"])
@pytest.mark.parametrize("padding", [{"pads": [1, 2, 0, 1]}, {"auto_pad": "SAME_UPPER"}], ids=["pads", "auto"])
def test_a_padded_convolution_gives_the_same_bits(how: Preprocessing, padding: dict[str, object]) -> None:
    """Its border is the mean; a folded shift would be wrong there."""
    taken = graph(how.channels, **padding)
    made, note = with_level_input(taken, how)
    assert "padded" in note
    u = levels(how.channels)
    np.testing.assert_array_equal(outputs(made, u), outputs(taken, normalised(u, how)))


def test_folding_into_a_padded_convolution_would_be_wrong() -> None:
    """The reason for the other way: pads that are added after folding change the border, and nothing else."""
    taken = graph(3)
    made, _ = with_level_input(taken, RGB)
    for padded in (taken, made):
        next(node for node in padded.graph.node if node.op_type == "Conv").attribute.append(
            helper.make_attribute("pads", [4, 0, 0, 0])
        )
    u = levels(3)
    error = np.abs(outputs(made, u) - outputs(taken, normalised(u, RGB)))
    assert error[:, :, 0].max() > 0.1
    assert error[:, :, 1:].max() < 1e-3


def test_an_input_with_other_readers_and_one_without_a_convolution_give_the_same_bits() -> None:
    twice = graph(3)
    twice.graph.node.append(helper.make_node("Identity", ["images"], ["also"], name="also"))
    flat = model([helper.make_node("Flatten", ["images"], ["out"], name="Flatten")], [], 3)
    u = levels(3)
    for taken in (twice, flat):
        made, _ = with_level_input(taken, RGB)
        np.testing.assert_array_equal(outputs(made, u), outputs(taken, normalised(u, RGB)))


def test_the_graph_that_was_given_is_unchanged() -> None:
    taken = graph(3)
    before = taken.SerializeToString()
    with_level_input(taken, RGB)
    assert taken.SerializeToString() == before


@pytest.mark.parametrize("how", [RGB, BGR, GRAY, FOUR], ids=["rgb", "bgr", "gray", "bands"])
def test_levels_survive_normalisation(how: Preprocessing) -> None:
    u = levels(how.channels)
    np.testing.assert_array_equal(levels_of(normalised(u, how), how), u)
