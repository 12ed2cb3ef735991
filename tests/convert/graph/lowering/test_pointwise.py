"""Pairs of 1×1 convolutions as products over channels: the same outputs, and only where that is so."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from repmlp_deploy.convert.graph.lowering.pointwise import with_bias_added, with_pointwise_products
from repmlp_deploy.convert.graph.proto import serialize_model
from support.graph_cases import SMALL, graph_case


def anything(_node: onnx.NodeProto) -> bool:
    return True


def run(model: onnx.ModelProto, inputs: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(serialize_model(model), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})


def pair_model(
    between: str = "Gelu", *, kernel: int = 1, bias: bool = True, watched: bool = False, **attributes: object
) -> onnx.ModelProto:
    """x (N, 3, 5, 4) through two convolutions with an activation between; `watched` makes that an output too."""
    rng = np.random.default_rng(0)
    weights = {
        "a.weight": rng.standard_normal((6, 3, kernel, kernel)),
        "a.bias": rng.standard_normal(6),
        "b.weight": rng.standard_normal((2, 6, 1, 1)),
        "b.bias": rng.standard_normal(2),
    }
    first, second = ["x", "a.weight", "a.bias"], ["g", "b.weight", "b.bias"]
    nodes = [
        helper.make_node("Conv", first if bias else first[:2], ["h"], name="first", **attributes),
        helper.make_node(between, ["h"], ["g"], name="between"),
        helper.make_node("Conv", second if bias else second[:2], ["y"], name="second"),
    ]
    shape = ["n", None, None, None]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (["y", "g"] if watched else "y")
    ]
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 5, 4])],
        outputs,
        [
            numpy_helper.from_array(value.astype(np.float32), name)
            for name, value in weights.items()
            if bias or not name.endswith("bias")
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("between", ["Gelu", "Relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pair_becomes_products_with_the_same_output(between: str, bias: bool) -> None:
    model = pair_model(between, bias=bias)
    before = serialize_model(model)
    turned = with_pointwise_products(model, anything)
    assert [op for op in ops(turned) if op != "Add"] == ["Transpose", "MatMul", between, "MatMul", "Transpose"]
    assert ops(turned).count("Add") == 2 * bias
    assert [node.name for node in turned.graph.node if node.op_type == "MatMul"] == ["first", "second"]
    inputs = np.random.default_rng(1).standard_normal((3, 3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(run(turned, inputs)[0], run(model, inputs)[0], atol=1e-5)
    onnx.checker.check_model(turned, full_check=True)
    assert serialize_model(model) == before, "the graph it was made from must not change"


@pytest.mark.parametrize(
    "model",
    [
        pair_model(kernel=3, pads=[1, 1, 1, 1]),
        pair_model(strides=[2, 2]),
        pair_model(pads=[1, 1, 1, 1]),
        pair_model("Tanh"),
        pair_model(watched=True),
    ],
    ids=["larger kernel", "stride", "padding", "another activation", "what is between is read"],
)
def test_what_is_no_such_pair_stays(model: onnx.ModelProto) -> None:
    assert with_pointwise_products(model, anything) is model


def test_a_convolution_that_is_not_wanted_stays_and_so_does_its_partner() -> None:
    model = pair_model()
    for kept in ("first", "second"):
        assert with_pointwise_products(model, lambda node, kept=kept: node.name != kept) is model


def test_weights_that_others_read_too_stay_as_they_are() -> None:
    model = pair_model()
    model.graph.node.append(helper.make_node("ReduceMean", ["a.weight"], ["m"], name="reader"))
    model.graph.output.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, None))
    assert with_pointwise_products(model, anything) is model


def test_of_three_convolutions_in_a_row_two_are_a_pair() -> None:
    model = pair_model()
    weight = np.ones((4, 2, 1, 1), np.float32)
    model.graph.node.extend(
        [
            helper.make_node("Relu", ["y"], ["r"], name="relu"),
            helper.make_node("Conv", ["r", "c.weight"], ["z"], name="third"),
        ]
    )
    model.graph.initializer.append(numpy_helper.from_array(weight, "c.weight"))
    model.graph.output[0].name = "z"
    turned = with_pointwise_products(model, anything)
    assert [op for op in ops(turned) if op in ("Conv", "MatMul")] == ["MatMul", "MatMul", "Conv"]
    inputs = np.random.default_rng(1).standard_normal((2, 3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(run(turned, inputs)[0], run(model, inputs)[0], atol=1e-5)


def test_nodes_need_no_names() -> None:
    model = pair_model()
    for node in model.graph.node:
        node.ClearField("name")
    turned = with_pointwise_products(model, anything)
    inputs = np.random.default_rng(1).standard_normal((2, 3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(run(turned, inputs)[0], run(model, inputs)[0], atol=1e-5)
    answering = with_bias_added(turned.graph)
    products = [node.output[0] for node in turned.graph.node if node.op_type == "MatMul"]
    assert [answering[name].output[0] for name in products] == ["h", "y_rows"]


@pytest.mark.parametrize("family", SMALL)
def test_every_family_answers_the_same(family: str) -> None:
    model = graph_case(family).model
    turned = with_pointwise_products(model, anything)
    if family.startswith("repmlpnet"):
        assert ops(turned).count("MatMul") > ops(model).count("MatMul")
        assert {node.name for node in model.graph.node} - {node.name for node in turned.graph.node} == set()
    inputs = np.random.default_rng(1).standard_normal((2, 3, *SMALL[family])).astype(np.float32)
    for got, expected in zip(run(turned, inputs), run(model, inputs), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
