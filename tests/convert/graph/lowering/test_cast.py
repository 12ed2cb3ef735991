"""Lowering by casts follows the types of ONNX: what takes no low type stays in float32, and nothing else is rounded."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper, parser

from repmlp_deploy.convert.graph.emulate import runnable_graphs
from repmlp_deploy.convert.graph.lowering.cast import float_tensors
from repmlp_deploy.convert.graph.lowering.lower import set_precision

WEIGHTS = {
    "w": np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32),
    "row": np.float32([[0.3, -0.2, 0.7, 0.1]]),
    "half": np.float32(0.5),
    "scales": np.float32([1, 1, 2]),
    "axis": np.int64([2]),
    "two": np.int64([2]),
    "one": np.int64(1),
    "half_of_it": np.int64(2),
    "four": np.int64([4]),
    "pads": np.int64([0, 0, 0, 1]),
}
GRAPHS = {
    "the size of a value": "s = Shape<end=1>(h) n = Concat<axis=0>(s, four) e = Expand(row, n) y = Add(h, e)",
    "a comparison": "m = Greater(h, half) y = Where(m, h, row)",
    "an index": "i = ArgMax<axis=1, keepdims=1>(h) g = GatherElements<axis=1>(h, i) y = Add(h, g)",
    "values and indices": "v, i = TopK<axis=1>(h, two) c = Cast<to=1>(i) a = Add(v, c) y = Concat<axis=1>(v, a)",
    "scales of sizes": "u = Unsqueeze(h, axis) r = Resize(u, , scales) y = ReduceMax<keepdims=0>(r, axis)",
    "a constant node": "c = Constant<value_float=0.3>() y = Add(h, c)",
    "a constant between": "c = Constant<value_float=0.3>() p = Pad(h, pads, c) y = MatMul(p, high)",
    "a sequence": "q = SplitToSequence<axis=1>(h, half_of_it) s = SequenceAt(q, one) y = Concat<axis=1>(s, s)",
    "a product of letters": 't = Relu(h) y = Einsum<equation="ij,kj->ik">(t, w)',
}


def make(body: str) -> onnx.ModelProto:
    text = (
        f'<ir_version: 9, opset_import: ["" : 20]> g (float[N, 4] x) => (float[N, 4] y) {{ h = MatMul(x, w) {body} }}'
    )
    model = parser.parse_model(text)
    weights = WEIGHTS | {"high": np.concatenate([WEIGHTS["w"], WEIGHTS["row"]])}
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in weights.items() if name in read)
    for node in model.graph.node:
        node.name = node.output[0]
    return model


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("body", GRAPHS.values(), ids=GRAPHS)
def test_every_operator_gets_the_types_it_takes(body: str, precision: str) -> None:
    model, x = make(body), np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    lowered = set_precision(model, precision)
    assert lowered.lowered["MatMul"] >= 1
    rounding = 5e-3 if precision == "fp16" else 5e-2
    for _, graph in runnable_graphs(lowered.model, precision):
        np.testing.assert_allclose(run(graph, x), run(model, x), rtol=rounding, atol=rounding)


def test_an_operator_that_has_no_low_type_stays_in_float32_and_says_so() -> None:
    """Einsum has float16 and no bfloat16; the scales of Resize are float32 in every precision."""
    einsum = make(GRAPHS["a product of letters"])
    assert [k.op for k in set_precision(einsum, "fp16").kept] == []
    assert [(k.op, k.reason) for k in set_precision(einsum, "bf16").kept] == [
        ("Einsum", "Einsum has no bfloat16 in ONNX")
    ]
    resize = set_precision(make(GRAPHS["scales of sizes"]), "fp16").model
    assert {t.name: t.data_type for t in resize.graph.initializer}["scales"] == TensorProto.FLOAT
    assert "r" in float_tensors(resize, TensorProto.FLOAT16)
