"""The names of weights in lowered graphs follow the table of precisions: a type that is added is known everywhere."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from repmlp_deploy.card import Preprocessing
from repmlp_deploy.convert.diagnosis.bisect import GraphValues
from repmlp_deploy.convert.graph.level_input import level_weights, with_level_input
from repmlp_deploy.convert.graph.lowering.lower import set_precision
from repmlp_deploy.convert.graph.lowering.names import lowered_name, parameter_of
from repmlp_deploy.convert.graph.nodes import module_of
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.rework.named_weights import named_weights
from repmlp_deploy.errors import CheckpointError, InputError
from repmlp_deploy.precision import PRECISIONS
from support.toy_precision import TOY

RNG = np.random.default_rng(0)
STATE = {
    "stem.weight": RNG.standard_normal((4, 3, 1, 1)).astype(np.float32),
    "stem.bias": RNG.standard_normal(4).astype(np.float32),
    "scale_float": RNG.standard_normal((4, 1, 1)).astype(np.float32),
}


@pytest.fixture(params=["DOUBLE", "FLOAT16", "BFLOAT16"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A precision that casts to the type; no other entry has the first."""
    monkeypatch.setitem(PRECISIONS, "toy", replace(TOY, name="toy", onnx_type=request.param, largest=100.0))
    return "toy"


def graph() -> onnx.ModelProto:
    image = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", c, 8, 8]) for name, c in (("x", 3), ("y", 4))]
    nodes = [
        helper.make_node("Conv", ["x", "stem.weight", "stem.bias"], ["a"], name="conv"),
        helper.make_node("Mul", ["a", "scale_float"], ["y"], name="mul"),
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in STATE.items()]
    made = helper.make_graph(nodes, "toy", image[:1], image[1:], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)])


@pytest.mark.parametrize("name", ["weight", "scale_float", "a.b", "w_int32"])
def test_a_name_without_its_type_is_the_parameters(name: str) -> None:
    assert parameter_of(name) == name
    for entry in PRECISIONS.values():
        if entry.lowering != "none":
            assert parameter_of(lowered_name(name, entry.onnx_type)) == name


def test_modules_weights_and_anchors_of_a_lowered_graph_are_found(precision: str) -> None:
    lowered = set_precision(graph(), precision).model
    names = [tensor.name for tensor in lowered.graph.initializer]
    assert [parameter_of(name) for name in names] == list(STATE)
    assert all(name not in STATE for name in names)
    assert next(module_of(node) for node in lowered.graph.node if node.op_type == "Conv") == "stem"
    values = GraphValues(serialize_model(lowered), "fp32")
    assert all(values.stored(name) is not None for name in STATE)
    read = {name for i in range(values.end) for name in values.weights_read(i)}
    assert read == set(STATE)


def test_a_lowered_graph_gets_other_weights_in_its_own_type(precision: str) -> None:
    lowered = set_precision(graph(), precision).model
    found = named_weights(STATE, lowered)
    kind = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(PRECISIONS[precision].onnx_type))
    assert {parameter_of(name): value.dtype for name, value in found.items()} == dict.fromkeys(STATE, kind)
    if kind.itemsize == 2:
        wrong = STATE | {"stem.bias": np.full(4, 3.4e38, np.float32)}
        entry = next(e for e in PRECISIONS.values() if e.onnx_type == PRECISIONS[precision].onnx_type)
        said = f"beyond {entry.element}'s {entry.largest:g}"
        with pytest.raises(CheckpointError, match=re.escape(said)):
            named_weights(wrong, lowered)


def test_a_graph_in_a_quantized_type_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = graph()
    made.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.int16), "codes"))
    named_weights(STATE, made)
    monkeypatch.setitem(PRECISIONS, "toy", replace(TOY, name="toy", onnx_type="INT16", lowering="quantize"))
    with pytest.raises(InputError, match="hold scales that were measured with one checkpoint"):
        named_weights(STATE, made)


def test_a_lowered_graph_that_takes_levels_is_recognised(precision: str) -> None:
    how = Preprocessing(mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0), input="uint8")
    taking, _ = with_level_input(graph(), how)
    folded = level_weights(STATE, set_precision(taking, precision).model, how)
    assert folded.keys() == STATE.keys() | {"x_centre"}
    assert not np.array_equal(folded["stem.weight"], STATE["stem.weight"])
