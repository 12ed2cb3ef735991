"""Everything that depends on a precision is read from one table, so an entry alone adds one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from repmlp_deploy.convert.graph.emulate import emulate
from repmlp_deploy.convert.graph.lowering.lower import PRODUCTS
from repmlp_deploy.errors import InputError, VerificationError
from repmlp_deploy.numerics import TOLERANCES
from repmlp_deploy.precision import PRECISIONS, Precision, Tolerance
from support.digit_cases import exported
from support.toy_precision import TOY


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Precision:
    monkeypatch.setitem(PRECISIONS, TOY.name, TOY)
    return TOY


def test_an_entry_alone_lowers_emulates_and_verifies_a_network(toy: Precision, tmp_path: Path) -> None:
    bundle = exported("repmlp-digits", tmp_path / "toy", toy.name)
    model = onnx.load(tmp_path / "toy" / "model.onnx")
    assert {t.data_type for t in model.graph.initializer if "weight" in t.name} == {onnx.TensorProto.FLOAT16}
    about = bundle.manifest.artifacts["onnx"].model_extra
    assert {op: about["lowered"].get(op, 0) for op in toy.sensitive} == dict.fromkeys(toy.sensitive, 0)
    assert any(about["lowered"].get(op) for op in PRODUCTS)
    assert {line["reason"] for line in about["kept_fp32"]} == {"a toy reason", "another toy reason"}
    hops = {n: [h for h in bundle.manifest.certificate if h.name == n] for n in ("fp12 ONNX", "fp12 ONNX, emulated")}
    for natively, emulated in zip(*hops.values(), strict=True):
        assert natively.passed
        assert emulated.passed
        assert emulated.allowed == pytest.approx(toy.tolerance.floor_ratio * emulated.floor)
        assert emulated.max_abs > 2 * natively.max_abs, "the toy's own emulator ran"


def test_a_network_that_misses_the_entrys_tolerance_is_refused_with_the_entrys_remedy(
    toy: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: float16 would pass this row, the toy's emulated weights do not."""
    strict = replace(toy, tolerance=Tolerance(floor_ratio=2.0**13, reason="too strict for 12 bits"))
    monkeypatch.setitem(PRECISIONS, toy.name, strict)
    with pytest.raises(VerificationError, match=r"fp12 ONNX, emulated at batch .*or use fp16"):
        exported("repmlp-digits", tmp_path / "toy", toy.name)
    assert not (tmp_path / "toy").exists()


def test_a_format_without_the_precision_refuses_it(toy: Precision) -> None:
    openvino = pytest.importorskip("repmlp_deploy.convert.formats.openvino")
    with pytest.raises(InputError, match=r"openvino has no precision fp12; it has fp32, fp16, bf16, int8"):
        openvino.check_precision(toy.name)


def test_the_tolerances_are_those_of_the_table(toy: Precision) -> None:
    assert TOLERANCES["fp12"] is toy.tolerance
    assert set(TOLERANCES) == {*PRECISIONS, "fp64", "weights"}
    assert len(TOLERANCES) == len(set(TOLERANCES))


@pytest.mark.parametrize("name", sorted(PRECISIONS))
def test_every_entry_is_complete(name: str) -> None:
    entry = PRECISIONS[name]
    assert entry.name == name
    assert onnx.TensorProto.DataType.Value(entry.onnx_type)
    assert entry.tolerance.reason
    assert entry.remedy
    assert entry.wider in {"", *PRECISIONS}
    assert entry.runs_on_cpu or entry.load_emulator() is not None, "nothing could verify it"
    assert entry.needs_calibration == (entry.lowering == "quantize")


def test_a_precision_without_an_emulator_is_not_changed() -> None:
    model = onnx.ModelProto()
    assert emulate(model, "int8") is model


def test_the_table_needs_no_framework() -> None:
    code = "import sys, repmlp_deploy.precision; print({'torch', 'onnx', 'numpy', 'openvino'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
