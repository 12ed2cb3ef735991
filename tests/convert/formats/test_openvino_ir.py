import subprocess
import sys

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as ops

from repmlp_deploy import Bundle
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.formats import openvino as openvino_ir
from repmlp_deploy.convert.formats.openvino import IR, build_ir, check_precision
from repmlp_deploy.errors import BuildError, InputError, MissingDependency
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.openvino.runner import CompiledIR
from repmlp_deploy.runtime.runner import RunnerOptions
from support.openvino_bundle import DIGIT, digits_ir

HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 instructions")
OPTIONS = RunnerOptions(threads=1)


def compiled(ir: IR, precision: str) -> CompiledIR:
    return CompiledIR(lambda: (ir.xml, ir.weights), precision, OPTIONS)


def relative_error(model: CompiledIR, bundle: Bundle, size: int) -> float:
    inputs, reference = bundle.probe().batch(size)
    return float(np.abs(model.run_all(inputs)[0] - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize(
    ("precision", "runs_in", "stored", "largest"),
    [
        ("fp32", {"f32": 24}, "f32", 1e-6),
        ("fp16", {"f32": 24}, "f16", 1e-3),
        pytest.param("bf16", {"bf16": 24}, "bf16", 1e-2, marks=needs_bf16),
        ("int8", {"i8": 1, "u8": 23}, "i8", 0.2),  # one FC3 reads levels around 0
    ],
)
def test_every_product_has_the_precision_and_every_batch_size_its_answer(
    bundle: Bundle, precision: str, runs_in: dict[str, int], stored: str, largest: float
) -> None:
    """FC3, convolutions and head alike; at batch 1 as well, where the plugin gets fused gates wrong."""
    ir = digits_ir(bundle, precision)
    model = compiled(ir, precision)
    assert model.products() == runs_in
    assert ir.details["product_weights"] == {stored: 24}
    assert not ir.details.get("kept_fp32")
    for size in (1, 3, 16):
        assert relative_error(model, bundle, size) < largest


def test_the_file_is_as_small_as_the_precision_says(bundle: Bundle) -> None:
    sizes = {name: len(digits_ir(bundle, name).weights) for name, entry in PRECISIONS.items() if entry.openvino}
    assert sizes["bf16"] == sizes["fp16"] < 0.55 * sizes["fp32"]
    assert sizes["int8"] < 0.3 * sizes["fp32"]


@needs_bf16
def test_weights_in_bf16_change_no_bit_of_what_the_plugin_computes_in_bf16(bundle: Bundle) -> None:
    inputs, _ = bundle.probe().batch(3)
    small, large = (compiled(digits_ir(bundle, stored), "bf16").run_all(inputs)[0] for stored in ("bf16", "fp32"))
    np.testing.assert_array_equal(small, large)


def test_large_products_are_cut_by_columns_and_answer_the_same(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column once, in its place, whatever does not divide by what; and only where many rows share a matrix."""
    whole = digits_ir(bundle, "bf16")
    monkeypatch.setattr(openvino_ir, "_LARGE_MATRIX", 600)
    monkeypatch.setattr(openvino_ir, "_ROWS_ENOUGH", bundle.manifest.batch.opt)
    cut = digits_ir(bundle, "bf16")
    before, now = (ir.details["product_weights"]["bf16"] for ir in (whole, cut))
    assert now > before == 24
    names = [op.get_friendly_name() for op in ov.Core().read_model(cut.xml, cut.weights).get_ordered_ops()]
    assert {"stages.0.0.fc3.columns0", "stages.0.0.fc3.columns1"} <= set(names)
    inputs, _ = bundle.probe().batch(3)
    answers = [compiled(ir, "fp32").run_all(inputs)[0] for ir in (whole, cut)]
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-6)
    single = build_ir(
        bundle.read(bundle.artifact("onnx")),
        precision="bf16",
        batch=BatchRange(min=1, opt=1, max=1),
        inputs={"images": DIGIT},
    )
    assert single.details["product_weights"]["bf16"] == before


def test_bf16_is_rounded_to_the_nearest_ties_to_even() -> None:
    ulp = 2.0**-7
    values = np.array([1, 1 + 0.4 * ulp, 1 + 0.5 * ulp, 1 + 0.6 * ulp, 1 + 1.5 * ulp, -1 - 0.6 * ulp, 0], np.float32)
    constant = ops.constant(openvino_ir._rounded(values, ov.Type.bf16))
    expected = np.array([1, 1, 1, 1 + ulp, 1 + 2 * ulp, -1 - ulp, 0], np.float32)
    np.testing.assert_array_equal(constant.get_data(dtype=np.float32), expected)


@needs_bf16
def test_gates_left_as_convolutions_would_be_wrong_at_batch_1(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect of OpenVINO that the matrix products are there for; a release without it may drop them."""
    monkeypatch.setattr(openvino_ir, "_turn_point_convolutions", lambda _model: None)
    model = compiled(digits_ir(bundle, "bf16"), "bf16")
    if relative_error(model, bundle, 1) < 0.02:
        pytest.skip(f"OpenVINO {ov.__version__} is right without them")
    assert relative_error(model, bundle, 3) < 0.02


def test_nothing_lies_between_the_products_of_a_gate_but_bias_and_activation(bundle: Bundle) -> None:
    """A reshape there would keep the plugin from fusing them."""
    ir = digits_ir(bundle, "fp32")
    model = ov.Core().read_model(ir.xml, ir.weights)
    second = [op for op in model.get_ordered_ops() if openvino_ir._module(op).endswith("gp.fc2")]
    assert len(second) == 4
    for op in second:
        path = [op.input_value(0).get_node()]
        while path[-1].get_type_name() != "MatMul":
            path.append(path[-1].input_value(0).get_node())
        assert [node.get_type_name() for node in path] == ["Relu", "Add", "MatMul"]
        assert openvino_ir._module(path[-1]).endswith("gp.fc1")


def test_a_range_stays_symbolic_and_a_single_size_is_fixed(bundle: Bundle) -> None:
    graph = bundle.read(bundle.artifact("onnx"))
    for batch, expected in ((BatchRange(min=1, opt=2, max=4), "?"), (BatchRange(min=2, opt=2, max=2), "2")):
        ir = build_ir(graph, precision="fp32", batch=batch, inputs={"images": DIGIT})
        shape = ov.Core().read_model(ir.xml, ir.weights).input(0).get_partial_shape()
        assert [str(edge) for edge in shape] == [expected, "3", "32", "32"]


def test_what_is_kept_in_fp32_stays_there_and_is_reported(bundle: Bundle) -> None:
    ir = digits_ir(bundle, "int8", keep_fp32=["stages.0.*", "head"])
    assert compiled(ir, "int8").products() == {"f32": 6, "i8": 1, "u8": 17}
    assert ir.details["product_weights"] == {"f32": 6, "i8": 18}
    assert sum(ir.details["lowered"].values()) == 18
    kept = ir.details["kept_fp32"]
    assert sorted({line["reason"] for line in kept}) == ["--keep-fp32 head", "--keep-fp32 stages.0.*"]
    assert {line["module"] for line in kept} >= {"head", "stages.0.0.fc3", "stages.0.0.gp.fc1"}
    assert len(kept) == 6
    half = digits_ir(bundle, "fp16", keep_fp32=["embeds"])
    assert half.details["product_weights"] == {"f16": 22, "f32": 2}


def test_a_weight_beyond_float16_stays_and_is_reported() -> None:
    parameter = ops.parameter([-1, 2], np.float32)
    product = ops.matmul(
        parameter, ops.constant(np.array([[1e5], [1]], np.float32)), transpose_a=False, transpose_b=False
    )
    model = ov.Model([product], [parameter], "large")
    assert list(openvino_ir._store_weights(model, ov.Type.f16, {}).values()) == ["weights beyond float16's 65504"]
    assert openvino_ir._report(model, {})["product_weights"] == {"f32": 1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int8", "calibration": None}, "int8 needs calibration inputs: pass --calibration"),
        ({"precision": "int8", "keep_fp32": ["nose.*"]}, r"--keep-fp32 nose\.\* matches no node; modules are conv_emb"),
        ({"precision": "bf16", "keep_fp32": ["head"]}, "a whole model in bf16 or none of it"),
        ({"precision": "int4"}, "openvino has no precision int4; it has fp32, fp16, bf16, int8"),
    ],
)
def test_what_cannot_be_had_is_refused(bundle: Bundle, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        digits_ir(bundle, **options)


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(BuildError, match="OpenVINO cannot read the graph: "):
        build_ir(b"no graph", precision="fp32", batch=BatchRange(min=1, opt=1, max=1), inputs={})


def test_without_nncf_int8_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingDependency, match=r'nncf is not installed: pip install "repmlp-deploy\[export\]"'):
        check_precision("int8")
    check_precision("fp16")


def test_int8_says_nothing_sends_nothing_and_needs_no_torch(bundle: Bundle) -> None:
    """The terminal stays empty, NNCF's telemetry is a stub, the environment is as before, torch is not imported."""
    script = f"""
import os, sys
from repmlp_deploy.bundle import BatchRange, Bundle
from repmlp_deploy.convert.formats.openvino import build_ir
sys.modules["torch"] = None
bundle = Bundle.load({str(bundle.folder)!r})
feeds = [{{"images": x[None]}} for x in bundle.probe().inputs]
ir = build_ir(bundle.read(bundle.artifact("onnx")), precision="int8", batch=bundle.manifest.batch,
              inputs={{"images": (3, 32, 32)}}, calibration=feeds)
assert ir.details["product_weights"] == {{"i8": 24}}
import nncf.telemetry.wrapper as wrapper
assert not isinstance(wrapper.telemetry, wrapper.NNCFTelemetry)
assert "NNCF_CI" not in os.environ
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
