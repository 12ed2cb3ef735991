"""Precisions of the graph: what is lowered, what is not, and that each is as close as its row says."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from repmlp_deploy import Bundle
from repmlp_deploy.convert.graph.emulate import emulate
from repmlp_deploy.convert.graph.lowering.lower import PRODUCTS, product_tensors, set_precision
from repmlp_deploy.convert.graph.lowering.pointwise import with_pointwise_products
from repmlp_deploy.convert.graph.nodes import module_of
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.errors import InputError, VerificationError
from repmlp_deploy.numerics import compare, is_close, noise_floor
from repmlp_deploy.runtime.onnx.runner import open_session
from repmlp_deploy.runtime.runner import RunnerOptions


@pytest.fixture
def graph(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load_from_string(bundle.read(bundle.artifact("onnx")))


@pytest.fixture
def ranges(graph: onnx.ModelProto, bundle: Bundle) -> dict[str, float]:
    """Largest absolute values on the probe, measured here and not by what is tested."""
    names = product_tensors(graph)
    exposed = onnx.ModelProto()
    exposed.CopyFrom(graph)
    exposed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    values = session(exposed).run(list(names), {"images": bundle.probe().inputs})
    return {name: float(np.abs(value).max()) for name, value in zip(names, values, strict=True)}


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    return open_session(serialize_model(model), RunnerOptions(device="cpu"))[0]


def run(model: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    return session(model).run(None, {"images": inputs})[0]


def types(model: onnx.ModelProto) -> set[str]:
    return {TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer if t.dims}


def test_float32_is_the_graph_itself(graph: onnx.ModelProto) -> None:
    lowered = set_precision(graph, "fp32")
    assert lowered.model is graph
    assert lowered.describe() == {"lowered": {}, "kept_fp32": []}


@pytest.mark.parametrize(("precision", "low"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_weights_have_the_low_type_and_borders_stay_float32(graph: onnx.ModelProto, precision: str, low: str) -> None:
    before = serialize_model(graph)
    lowered = set_precision(graph, precision)
    assert types(lowered.model) == {low, "INT64"}
    borders = [*lowered.model.graph.input, *lowered.model.graph.output]
    assert {value.type.tensor_type.elem_type for value in borders} == {TensorProto.FLOAT}
    assert len(serialize_model(lowered.model)) < 0.6 * len(before)
    assert serialize_model(graph) == before, "the graph it was made from must not change"


def test_every_product_is_lowered_and_every_other_node_accounted_for(graph: onnx.ModelProto) -> None:
    counts = {op: sum(node.op_type == op for node in graph.graph.node) for op in PRODUCTS}
    for precision in ("fp16", "bf16"):
        lowered = set_precision(graph, precision)
        assert {op: lowered.lowered[op] for op in PRODUCTS} == counts
        assert sum(lowered.lowered.values()) + len(lowered.kept) == len(graph.graph.node)
        assert all(kept.reason for kept in lowered.kept)


def test_fp16_is_as_close_as_its_row_says(graph: onnx.ModelProto, bundle: Bundle) -> None:
    probe = bundle.probe()
    result = compare(run(set_precision(graph, "fp16").model, probe.inputs), probe.reference)
    floor = noise_floor(probe.float32, probe.reference)
    assert is_close(result, floor=floor, precision="fp16")
    assert not is_close(result, floor=floor, precision="fp32"), "nothing was lowered"


def test_bf16_emulated_is_as_close_as_its_row_says_and_coarser_than_fp16(
    graph: onnx.ModelProto, bundle: Bundle
) -> None:
    probe = bundle.probe()
    floor = noise_floor(probe.float32, probe.reference)
    coarse = compare(run(emulate(set_precision(graph, "bf16").model, "bf16"), probe.inputs), probe.reference)
    fine = compare(run(set_precision(graph, "fp16").model, probe.inputs), probe.reference)
    assert is_close(coarse, floor=floor, precision="bf16")
    assert coarse.max_abs > 3 * fine.max_abs, "bf16 has three bits less than fp16"


def test_emulation_rounds_every_value_to_bf16() -> None:
    """Two products of values that bf16 cannot hold, against the same by hand."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((8, 8)).astype(np.float32) for _ in range(2))
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"], name="n0"), helper.make_node("MatMul", ["h", "b"], ["y"])]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in ("x", "y")]
    weights = [numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "b")]
    small = helper.make_model(
        helper.make_graph(nodes, "g", border[:1], border[1:], weights), opset_imports=[helper.make_opsetid("", 20)]
    )
    inputs = rng.standard_normal((4, 8)).astype(np.float32)

    def bf16(values: np.ndarray) -> np.ndarray:
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    expected = bf16(bf16(bf16(inputs) @ bf16(first)) @ bf16(second))
    emulated = emulate(set_precision(small, "bf16").model, "bf16")
    got = session(emulated).run(None, {"x": inputs})[0]
    np.testing.assert_allclose(got, expected, rtol=2**-7)
    assert np.abs(got - inputs @ first @ second).max() > 1e-3


def test_int8_quantizes_every_product_symmetrically_and_the_residual_not(
    graph: onnx.ModelProto, ranges: dict[str, float]
) -> None:
    model = set_precision(graph, "int8", ranges=ranges).model
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    assert len(products) == sum(node.op_type in PRODUCTS for node in graph.graph.node)
    for node in products:
        sources = [makers[name] for name in node.input[:2]]
        assert [source.op_type for source in sources] == ["DequantizeLinear"] * 2
        assert all((weights[source.input[2]] == 0).all() for source in sources), "TensorRT takes no zero point"
        assert weights[sources[1].input[0]].dtype == np.int8
    adds = [makers[name] for node in model.graph.node if node.op_type == "Add" for name in node.input if name in makers]
    quantized_residual = [n for n in adds if n.op_type == "DequantizeLinear" and not n.input[0].endswith("_rounded")]
    assert not quantized_residual


def test_int8_weights_have_a_scale_an_output(graph: onnx.ModelProto, ranges: dict[str, float]) -> None:
    """And FC3 of several sharesets a single one; every scale reaches the largest weight exactly."""
    model = set_precision(graph, "int8", ranges=ranges).model
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    original = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    for name, given in original.items():
        if f"{name}_int8" not in weights:
            continue
        stored, scale = weights[f"{name}_int8"], weights[f"{name}_scale"]
        node = next(n for n in model.graph.node if n.input and n.input[0] == f"{name}_int8")
        axis = next((a.i for a in node.attribute), None)
        # a 1×1 convolution may have become a product over channels: (O, C, 1, 1) -> (C, O)
        values = given if given.ndim == stored.ndim else given[:, :, 0, 0].T
        assert scale.shape == (() if axis is None else (values.shape[axis],))
        assert (axis is None) == (values.ndim == 3)
        shape = [-1 if i == axis else 1 for i in range(values.ndim)] if axis is not None else ()
        restored = stored * scale.reshape(shape)
        assert np.abs(restored - values).max() <= 0.5001 * scale.max()
        assert np.abs(stored).max() == 127


def test_int8_is_as_close_as_its_row_says(graph: onnx.ModelProto, ranges: dict[str, float], bundle: Bundle) -> None:
    probe = bundle.probe()
    floor = noise_floor(probe.float32, probe.reference)
    result = compare(run(set_precision(graph, "int8", ranges=ranges).model, probe.inputs), probe.reference)
    assert is_close(result, floor=floor, precision="int8")
    wrong = {name: value / 50 for name, value in ranges.items()}
    clipped = compare(run(set_precision(graph, "int8", ranges=wrong).model, probe.inputs), probe.reference)
    assert not is_close(clipped, floor=floor, precision="int8")


def test_int8_runs_in_integers_in_onnx_runtime(graph: onnx.ModelProto, ranges: dict[str, float], tmp_path) -> None:
    """Not in float32 behind the pairs, which only ONNX Runtime's own optimised graph can tell."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    model = serialize_model(set_precision(graph, "int8", ranges=ranges).model)
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    before = [node.op_type for node in with_pointwise_products(graph, lambda _: True).graph.node]
    assert ops.count("QLinearConv") == before.count("Conv") > 0
    assert ops.count("MatMulIntegerToFloat") == before.count("MatMul") > 0
    assert not {"Conv", "MatMul"} & set(ops)


def test_int8_quantizes_in_front_of_transpositions(graph: onnx.ModelProto, ranges: dict[str, float]) -> None:
    """So that they move bytes; and what is quantized again behind one is what was quantized before, bit by bit."""
    model = set_precision(graph, "int8", ranges=ranges).model
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = {name: node for node in model.graph.node for name in node.input}
    inside = [
        node
        for node in model.graph.node
        if node.op_type == "Transpose" and readers[node.output[0]].op_type == "QuantizeLinear"
    ]
    assert inside
    for node in inside:
        before, behind = makers[node.input[0]], readers[node.output[0]]
        assert before.op_type == "DequantizeLinear"
        assert before.input[1:] == behind.input[1:]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_what_a_pattern_names_stays_in_float32(
    graph: onnx.ModelProto, ranges: dict[str, float], precision: str
) -> None:
    """With its own float32 weights, bit by bit."""
    lowered = set_precision(graph, precision, ranges=ranges, keep_fp32=["stages.0.*", "head"])
    kept = {k.module for k in lowered.kept if k.reason == "kept by pattern"}
    inside = {m for node in graph.graph.node if (m := module_of(node)).startswith("stages.0.") or m == "head"}
    if precision == "int8":
        assert kept == inside & {module_of(node) for node in graph.graph.node if node.op_type in PRODUCTS}
    else:
        assert kept == inside
        assert "Gelu" in {k.op for k in lowered.kept}, "what has no weights belongs to its block too"
    weights = {tensor.name: tensor for tensor in lowered.model.graph.initializer}
    for tensor in graph.graph.initializer:
        if tensor.name.startswith(("stages.0.", "head")):
            assert weights[tensor.name].raw_data == tensor.raw_data
        elif tensor.name.endswith("fc3"):
            assert tensor.name not in weights
    described = [k["module"] for k in lowered.describe()["kept_fp32"] if "module" in k]
    assert "stages.0.0.fc3" in described


def test_a_pattern_that_matches_nothing_is_refused_with_names(graph: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match=r"--keep-fp32 stage\.7 matches no node; modules are conv_embedding.conv, "):
        set_precision(graph, "fp16", keep_fp32=["stage.7"])


def test_keeping_everything_is_refused(graph: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match="leaves no product for fp16"):
        set_precision(graph, "fp16", keep_fp32=["*"])


def test_int8_without_ranges_is_refused(graph: onnx.ModelProto, ranges: dict[str, float]) -> None:
    with pytest.raises(InputError, match="pass --calibration"):
        set_precision(graph, "int8")
    ranges.pop("images")
    with pytest.raises(InputError, match="calibration measured no range of images"):
        set_precision(graph, "int8", ranges=ranges)


def test_a_weight_beyond_float16_is_named_with_its_remedy(graph: onnx.ModelProto) -> None:
    large = onnx.ModelProto()
    large.CopyFrom(graph)
    tensor = next(t for t in large.graph.initializer if t.name == "head.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] = 1e5
    tensor.raw_data = values.tobytes()
    with pytest.raises(
        VerificationError, match=r"head.weight holds 1e\+05, beyond float16's 65504: pass --keep-fp32 'head'"
    ):
        set_precision(large, "fp16")
    assert set_precision(large, "fp16", keep_fp32=["head"]).lowered
    assert set_precision(large, "bf16").lowered


def test_metadata_survives(graph: onnx.ModelProto, ranges: dict[str, float]) -> None:
    for precision in ("fp16", "bf16", "int8"):
        model = set_precision(graph, precision, ranges=ranges).model
        assert list(model.metadata_props) == list(graph.metadata_props)


def int8_errors(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], inputs: np.ndarray) -> list[float]:
    """Return the largest error of int8 as ONNX Runtime fuses it, and unfused; inputs are x, outputs y."""
    exact = _model(nodes, weights, inputs, [name for node in nodes for name in node.output])
    values = dict(zip([v.name for v in exact.graph.output], session(exact).run(None, {"x": inputs}), strict=True))
    ranges = {name: float(np.abs(value).max()) for name, value in (values | {"x": inputs}).items()}
    model = _model(nodes, weights, inputs, ["y"])
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, values["y"].shape))
    lowered = serialize_model(set_precision(model, "int8", ranges=ranges).model)
    errors = []
    for level in (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        answer = ort.InferenceSession(lowered, options, providers=["CPUExecutionProvider"]).run(None, {"x": inputs})
        errors.append(float(np.abs(answer[0] - values["y"]).max()))
    return errors


def _model(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], inputs: np.ndarray, outputs: list[str]
) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs.shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )


@pytest.mark.parametrize("factor", [1e-7, 0.0])
@pytest.mark.parametrize("kind", ["conv", "gemm", "matmul", "shared"])
def test_int8_keeps_the_bias_of_channels_without_weights(kind: str, factor: float) -> None:
    """As a BatchNorm leaves them whose weight went to 0; fused, the bias would saturate at 0."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 8)), "b": np.ones(8)}
    weights["w"][:, 2] *= factor
    inputs = rng.standard_normal((5, 8)).astype(np.float32)
    if kind == "conv":
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="n")]
        weights["w"], inputs = weights["w"].T.reshape(8, 8, 1, 1), inputs[:, :, None, None]
    elif kind == "matmul":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="n"), helper.make_node("Add", ["b", "h"], ["y"])]
    else:
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="n")]
    if kind == "shared":  # fused, for its result is quantized; the scale that the second needs is not enough for it
        weights["small"] = weights["b"] * 1e-6
        first = helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="m")
        nodes = [first, helper.make_node("Gemm", ["h", "w", "small"], ["y"], name="n")]
    fused, unfused = int8_errors(nodes, weights, inputs)
    assert fused < 0.3
    assert fused == pytest.approx(unfused, abs=1e-3)


def test_int8_keeps_the_bias_of_a_product_whose_input_was_always_zero() -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 8, 1, 1)), "b": np.ones(4)}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="n")]
    assert max(int8_errors(nodes, weights, np.zeros((2, 8, 3, 3), np.float32))) < 1e-2


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_int8_of_a_layer_that_runs_twice_has_codes_of_its_own_each_time(kind: str) -> None:
    """ONNX Runtime does not open a graph with shared codes in its precise mode, which a session asks for."""
    rng = np.random.default_rng(0)
    weights, inputs = {"w": rng.standard_normal((8, 8))}, rng.standard_normal((5, 8)).astype(np.float32)
    if kind == "Conv":
        weights, inputs = {"w": weights["w"].reshape(8, 8, 1, 1)}, inputs[:, :, None, None].repeat(2, axis=3)
    nodes = [helper.make_node(kind, [x, "w"], [y], name=y) for x, y in (("x", "h"), ("h", "f"), ("f", "y"))]
    model = _model(nodes, weights, inputs, ["y"])
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, inputs.shape))
    lowered = set_precision(model, "int8", ranges=dict.fromkeys(("x", "h", "f", "y"), 100.0)).model
    session(lowered).run(None, {"x": inputs})
    widened = [node for node in lowered.graph.node if node.op_type == "DequantizeLinear" and "w" in node.output[0]]
    read = [node.input[0] for node in widened]
    assert len(set(read)) == len(read) == len(nodes)


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
def test_int8_multiplies_by_a_vector(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="n")]
    inputs = rng.standard_normal(shape).astype(np.float32)
    assert max(int8_errors(nodes, {"w": rng.standard_normal(8)}, inputs)) < 0.1


@pytest.mark.parametrize("hidden", [4, 8])
@pytest.mark.parametrize("biased", [True, False])
def test_int8_has_one_scale_for_weights_that_are_read_along_both_axes(hidden: int, *, biased: bool) -> None:
    """As in a tied autoencoder. The room for each bias is that of its own axis, also where both are of one length."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((hidden, 8)), "a": np.ones(hidden), "b": np.ones(8)}
    weights["w"][1], weights["w"][:, 2] = 0, 0
    inputs = rng.standard_normal((5, 8)).astype(np.float32)
    first, second = (["x", "w", "a"], ["h", "w", "b"]) if biased else (["x", "w"], ["h", "w"])
    nodes = [helper.make_node("Gemm", first, ["h"], name="m", transB=1), helper.make_node("Gemm", second, ["y"])]
    ranges = dict.fromkeys(("x", "h", "y"), 10.0)
    model = _model(nodes, weights, inputs, ["y"])
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, inputs.shape))
    lowered = set_precision(model, "int8", ranges=ranges).model
    assert next(tensor for tensor in lowered.graph.initializer if tensor.name == "w_scale").dims == []
    assert max(int8_errors(nodes, weights, inputs)) < 0.5


@pytest.mark.parametrize(
    ("perm", "weight", "crashes"),
    [
        ((1, 0, 2), (8, 3), True),
        ((1, 2, 0), (8, 3), True),
        ((1, 2, 0, 3), (8, 8, 3), True),
        ((1, 0, 2), (8, 8, 3), False),
        ((0, 2, 1), (8, 3), False),
        ((2, 1, 0), (8, 3), False),
    ],
)
def test_what_crashes_onnx_runtime_in_fp16_stays_in_float32(
    perm: tuple[int, ...], weight: tuple[int, ...], *, crashes: bool
) -> None:
    """As in an nn.TransformerEncoderLayer, where a linear layer follows the exchange of two axes."""
    rng = np.random.default_rng(0)
    weights, inputs = {"w": rng.standard_normal(weight)}, rng.standard_normal((8,) * len(perm)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=perm, name="t"),
        helper.make_node("MatMul", ["t", "w"], ["h"], name="m"),
        helper.make_node("MatMul", ["h", "v"], ["y"], name="n"),
    ]
    weights["v"] = rng.standard_normal((3, 3))
    expected = np.transpose(inputs, perm) @ weights["w"] @ weights["v"]
    model = _model(nodes, weights, inputs, ["y"])
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, expected.shape))
    lowered = set_precision(model, "fp16")
    assert [(kept.node, kept.reason) for kept in lowered.kept] == [
        (name, "ONNX Runtime crashes with it in fp16") for name in ("t", "m") if crashes
    ]
    (answer,) = session(lowered.model).run(None, {"x": inputs})
    np.testing.assert_allclose(answer, expected, atol=0.1)
