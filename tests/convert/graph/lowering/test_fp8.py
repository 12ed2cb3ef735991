"""fp8: E4M3 pairs around every product, computed alike by ONNX Runtime at every level, built by TensorRT-RTX."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from repmlp_deploy.card import data_root
from repmlp_deploy.convert import graphs
from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.formats.openvino import check_precision
from repmlp_deploy.convert.formats.tensorrt.build import GraphSpec, build_engine
from repmlp_deploy.convert.graph.calibrate import measure_ranges, take_calibration
from repmlp_deploy.convert.graph.lowering.lower import Lowered, product_tensors, set_precision
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.proof.probe import probe_inputs
from repmlp_deploy.convert.rework.refit import refit_bundle
from repmlp_deploy.errors import BuildError, InputError, VerificationError
from support.digit_cases import exported
from support.graph_cases import SMALL, graph_case

FAMILY = "repmlp-resnet"  # its convolutions follow Relu
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


@cache
def lowered(precision: str) -> onnx.ModelProto:
    model, shape = graph_case(FAMILY).model, (3, *SMALL[FAMILY])
    calibration = take_calibration({"images": probe_inputs(shape, samples=32)}, {"images": shape})
    ranges = measure_ranges(serialize_model(model), calibration, product_tensors(model), "minmax")
    return set_precision(model, precision, ranges=ranges).model


def run(model: onnx.ModelProto, level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(serialize_model(model), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": probe_inputs((3, *SMALL[FAMILY]), samples=4)})[0]


def test_weights_are_the_nearest_code_in_units_of_their_scale() -> None:
    model = lowered("fp8")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    trained = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph_case(FAMILY).model.graph.initializer}
    name = "stage0.0.conv.weight"
    stored = tensors[f"{name}_float8e4m3fn"]
    assert stored.data_type == TensorProto.FLOAT8E4M3FN
    scale = numpy_helper.to_array(tensors[f"{name}_scale"])
    codes = np.frombuffer(stored.raw_data, helper.tensor_dtype_to_np_dtype(stored.data_type)).astype(np.float32)
    values = codes.reshape(trained[name].shape) * scale[:, None, None, None]
    largest = np.abs(trained[name]).max(axis=(1, 2, 3))
    np.testing.assert_allclose(scale * 448, largest, rtol=1e-6)
    smallest = scale[:, None, None, None] * 2.0**-9  # the step of the smallest codes
    assert (np.abs(values - trained[name]) <= np.maximum(np.abs(trained[name]) * 2**-4, smallest) * 1.001).all()


def test_onnx_runtime_computes_the_same_whatever_it_optimizes() -> None:
    """It would remove a Relu before these pairs, so there is none."""
    model = lowered("fp8")
    assert not [node for node in model.graph.node if node.op_type == "Relu"]
    exact = run(graph_case(FAMILY).model)
    answers = [run(model, level) for level in LEVELS]
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], rtol=1e-4, atol=1e-5)
    error = np.abs(answers[0] - exact).max() / np.abs(exact).max()
    assert 1e-3 < error < 0.2


@pytest.mark.parametrize("targets", [(), ("8.9",), ("12.0",)])
def test_the_real_builder_multiplies_in_fp8(targets: tuple[str, ...]) -> None:
    case = graph_case(FAMILY)
    spec = GraphSpec(case.spec.inputs, case.spec.batch, "fp8")
    engine = build_engine("trt-rtx", serialize_model(lowered("fp8")), spec, EngineOptions(compute_capabilities=targets))
    products = sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in case.model.graph.node)
    assert engine.details["product_types"] == {"fp8": products}


def test_ampere_has_none() -> None:
    case = graph_case(FAMILY)
    spec = GraphSpec(case.spec.inputs, case.spec.batch, "fp8")
    with pytest.raises(BuildError, match="fp8"):
        build_engine("trt-rtx", serialize_model(lowered("fp8")), spec, EngineOptions(compute_capabilities=("8.6",)))


@pytest.mark.slow
def test_a_bundle_in_fp8_is_proved_and_its_twin_with_wrong_ranges_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported("repmlp-digits", tmp_path / "out", "fp8", formats="onnx,trt-rtx")
    hops = [hop for hop in bundle.manifest.certificate if hop.name == "fp8 ONNX"]
    assert len(hops) == 3
    assert all(hop.passed and hop.margin > 3 for hop in hops)
    assert {entry.precision for entry in bundle.manifest.artifacts.values()} == {"fp8"}
    assert bundle.manifest.artifacts["trt-rtx"].model_extra["product_types"] == {"fp8": 24}
    with pytest.raises(InputError, match="8-bit graphs hold scales"):
        refit_bundle(tmp_path / "out", data_root() / "weights" / "repmlp-digits.safetensors")

    def clipping(graph: onnx.ModelProto, precision: str, **options: object) -> Lowered:
        ranges = {name: value / 50 for name, value in options.pop("ranges").items()}
        return set_precision(graph, precision, ranges=ranges, **options)

    monkeypatch.setattr(graphs, "set_precision", clipping)
    with pytest.raises(VerificationError, match=r"fp8 ONNX at batch .* nothing was written; give more or better"):
        exported("repmlp-digits", tmp_path / "wrong", "fp8")


def test_openvino_has_no_fp8() -> None:
    with pytest.raises(InputError, match="openvino has no precision fp8; it has fp32, fp16, bf16, int8"):
        check_precision("fp8")
