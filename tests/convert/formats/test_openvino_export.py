"""OpenVINO artifacts from a checkpoint to a bundle: certificate, refusals; and accuracy on real digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from repmlp_deploy import Predictor
from repmlp_deploy.bundle import MANIFEST, Bundle
from repmlp_deploy.convert.formats import openvino as openvino_ir
from repmlp_deploy.convert.proof.certificate import recertify
from repmlp_deploy.errors import InputError, VerificationError
from support.digit_cases import exported, scans

pytestmark = pytest.mark.slow  # many exports, seconds each

HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("card", ["repmlp-digits", "pure-mlp-digits"])
def test_no_digit_is_lost_but_half_a_point_in_int8(card: str, tmp_path: Path) -> None:
    """On the 450 held-out digits, which neither training nor calibration has seen, in the runner services use."""
    inputs, labels = scans(card, held_out=True)
    right = {}
    for precision in ("fp32", "fp16", "bf16", "int8") if HAS_BF16 else ("fp32", "fp16", "int8"):
        bundle = exported(card, tmp_path / precision, precision, formats="openvino")
        entry = bundle.artifact("openvino")
        assert entry.precision == precision
        step = f"OpenVINO {precision}"
        assert [hop.batch for hop in bundle.manifest.certificate if hop.name == step] == [1, 3, 8]
        with Predictor(bundle, threads=1) as predictor:
            assert predictor.format == "openvino"
            right[precision] = int((predictor.logits(inputs).argmax(axis=1) == labels).sum())
        hops, _ = recertify(Bundle.load(bundle.folder), "openvino")
        assert all(hop.passed for hop in hops[1:])
    assert right["fp32"] >= 0.97 * len(labels)
    assert right["fp16"] == right["fp32"]
    assert right.get("bf16", right["fp32"]) >= right["fp32"]
    assert right["int8"] >= right["fp32"] - 0.005 * len(labels)


def test_a_bundle_holds_both_files_and_only_these(tmp_path: Path) -> None:
    bundle = exported("repmlp-digits", tmp_path / "out", "fp16", formats="onnx,openvino")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(MANIFEST, "probe.npz", "model.onnx", "model.xml", "model.bin"),
    }
    entry = bundle.artifact("openvino")
    assert [companion.path for companion in entry.companions] == ["model.bin"]
    assert (entry.model_extra or {})["products"] == {"f32": 24}
    assert any("computes in float32" in note for note in bundle.manifest.notes)


def test_an_ir_that_strays_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product's weights a hundredth off: nothing else of the pipeline would notice."""
    real = openvino_ir._turn_point_convolutions

    def spoil(model: ov.Model) -> None:
        real(model)
        weights = next(node for op in openvino_ir.products(model) if (node := openvino_ir.weights_of(op)) is not None)
        scaled = openvino_ir.ops.constant(weights.data * np.float32(1.01))
        for reader in list(weights.output(0).get_target_inputs()):
            reader.replace_source_output(scaled.output(0))

    monkeypatch.setattr(openvino_ir, "_turn_point_convolutions", spoil)
    with pytest.raises(VerificationError, match="OpenVINO fp32 at batch 1"):
        exported("repmlp-digits", tmp_path / "out", "fp32", formats="openvino")
    assert not (tmp_path / "out").exists()


def test_what_openvino_cannot_do_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a whole model in bf16 or none of it"):
        exported("no-such-card", tmp_path / "out", "bf16", formats="openvino", keep_fp32=("stages.0.*",))
