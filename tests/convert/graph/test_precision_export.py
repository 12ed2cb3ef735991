"""Precisions from a checkpoint to a bundle: certificate, report, refusals; and accuracy on real digits."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from repmlp_deploy import Bundle, Predictor, export
from repmlp_deploy.cli.shared.bundle_report import print_sensitivity
from repmlp_deploy.convert import graphs, pipeline
from repmlp_deploy.convert.graph.emulate import emulate
from repmlp_deploy.convert.graph.lowering.lower import Lowered, set_precision
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.errors import InputError, MissingDevice, VerificationError
from repmlp_deploy.runtime.onnx.runner import open_session
from repmlp_deploy.runtime.runner import RunnerOptions
from support.digit_cases import exported, scans

pytestmark = pytest.mark.slow  # many exports, seconds each

CARDS = ("repmlp-digits", "pure-mlp-digits")


@pytest.mark.parametrize("card", CARDS)
def test_no_digit_is_lost_in_16_bits_and_at_most_half_a_point_in_8(card: str, tmp_path: Path) -> None:
    """On the 450 held-out digits, which neither training nor calibration has seen."""
    inputs, labels = scans(card, held_out=True)
    right = {}
    for precision in ("fp32", "fp16", "bf16", "int8", "fp8"):
        exported(card, tmp_path / precision, precision)
        model = onnx.load(tmp_path / precision / "model.onnx")
        if precision == "bf16":
            model = emulate(model, "bf16")
        session, _ = open_session(serialize_model(model), RunnerOptions(device="cpu"))
        answers = session.run(None, {"images": inputs})[0].argmax(axis=1)
        right[precision] = int((answers == labels).sum())
    assert right["fp32"] >= 446
    assert right["fp16"] == right["bf16"] == right["fp32"]
    assert right["int8"] >= right["fp32"] - 0.005 * len(labels)
    assert right["fp8"] >= right["fp32"] - 0.005 * len(labels)


@pytest.mark.parametrize(("precision", "step"), [("fp16", "fp16 ONNX"), ("bf16", "bf16 ONNX, emulated")])
def test_the_certificate_has_a_hop_of_the_precision(tmp_path: Path, precision: str, step: str) -> None:
    bundle = exported("repmlp-digits", tmp_path / "out", precision, formats="onnx,trt-rtx")
    hops = [hop for hop in bundle.manifest.certificate if hop.name == step]
    assert [hop.batch for hop in hops] == [1, 3, 8]
    assert all(hop.passed for hop in hops)
    exact = [hop for hop in bundle.manifest.certificate if hop.name == "simplified ONNX"]
    assert all(low.max_abs > 100 * high.max_abs for low, high in zip(hops, exact, strict=True))
    for entry in bundle.manifest.artifacts.values():
        assert entry.precision == precision
    types = bundle.manifest.artifacts["trt-rtx"].model_extra["layer_types"]
    assert types[{"fp16": "half", "bf16": "bf16"}[precision]] > types.get("float", 0)


def test_an_int8_bundle_says_what_it_was_calibrated_with_and_what_stays(tmp_path: Path) -> None:
    bundle = exported("repmlp-digits", tmp_path / "out", "int8", keep_fp32=["stages.0.0"], formats="onnx,trt-rtx")
    manifest = bundle.manifest
    about = manifest.artifacts["onnx"].model_extra
    assert about["calibration"] == {"method": "minmax", "samples": 120}
    assert about["lowered"] == {"Conv": 3, "MatMul": 15, "Gemm": 1}
    assert {"stages.0.0.fc3/MatMul", "stages.0.0.gp.fc1/Conv"} <= {line.get("node") for line in about["kept_fp32"]}
    calibrated = "calibrated with 120 of 128 samples of arrays in memory; the probe has 8 of those that were not used"
    assert calibrated in manifest.notes
    assert len(bundle.probe().inputs) == pipeline.PROBED, "int8 is judged on samples that its ranges have not seen"
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert any(tensor.data_type == onnx.TensorProto.INT8 for tensor in model.graph.initializer)
    whole = exported("repmlp-digits", tmp_path / "whole", "int8")
    assert whole.manifest.artifacts["onnx"].bytes < manifest.artifacts["onnx"].bytes


def test_the_most_sensitive_block_is_told_and_keeping_it_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = exported("repmlp-digits", tmp_path / "whole", "int8", sensitivity=True)
    lines = whole.manifest.artifacts["onnx"].model_extra["sensitivity"]
    errors = [line["max_abs"] for line in lines]
    assert errors == sorted(errors, reverse=True)
    blocks = {line["block"] for line in lines}
    assert blocks == {"conv_embedding", "embeds.0", "embeds.1", "head"} | {
        f"stages.{i}.{j}" for i, depth in enumerate((1, 2, 1)) for j in range(depth)
    }
    print_sensitivity(whole)
    rows = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    told = [[cell.strip() for cell in row] for row in rows]
    assert told == [[line["block"], f"{line['max_abs']:.2e}"] for line in lines]
    worst = [line["block"] for line in lines[:3]]
    kept = exported("repmlp-digits", tmp_path / "kept", "int8", keep_fp32=worst)

    def mean_error(bundle: Bundle) -> float:
        return next(hop.mean_abs for hop in bundle.manifest.certificate if hop.name == "int8 ONNX" and hop.batch == 8)

    assert mean_error(kept) < mean_error(whole)


def test_a_wrong_quantizer_is_caught_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clipping(graph: onnx.ModelProto, precision: str, **options: object) -> Lowered:
        ranges = {name: value / 50 for name, value in options.pop("ranges").items()}
        return set_precision(graph, precision, ranges=ranges, **options)

    monkeypatch.setattr(graphs, "set_precision", clipping)
    with pytest.raises(VerificationError, match=r"int8 ONNX at batch .* nothing was written; give more or better"):
        exported("repmlp-digits", tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_a_bf16_graph_is_refused_by_a_runtime_that_cannot_compute_it(tmp_path: Path) -> None:
    bundle = exported("repmlp-digits", tmp_path / "out", "bf16")
    with pytest.raises(MissingDevice, match="cannot compute this graph"):
        Predictor(bundle, format="onnx", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "int8 needs calibration images: pass --calibration DIR"),
        ({"precision": "bf16", "calibration": "x"}, "--calibration is for int8, fp8 and fp16, and --precision is bf16"),
        ({"precision": "fp32", "keep_fp32": ["head"]}, "--keep-fp32 says nothing where everything is fp32"),
        ({"precision": "fp32", "sensitivity": True}, "--sensitivity says nothing where everything is fp32"),
        ({"precision": "fp16", "formats": "onnx,torch"}, "--format torch is float32, not fp16"),
        ({"precision": "fp4"}, "--precision fp4: unknown; did you mean fp8"),
        ({"calibration_method": "max"}, "--calibration-method max: unknown"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_done(
    digits_checkpoint: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export(digits_checkpoint, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
