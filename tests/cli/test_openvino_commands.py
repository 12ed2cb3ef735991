"""OpenVINO artifacts from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.cli import export as export_cli
from repmlp_deploy.cli import predict as predict_cli
from repmlp_deploy.cli import verify as verify_cli
from support.commands import SAMPLES, ends_with
from support.openvino_bundle import with_openvino


def test_an_export_shows_both_files_and_verifies_again(
    capsys: pytest.CaptureFixture[str], digits_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("--ckpt", digits_checkpoint, "--format", "openvino", "--precision", "fp16", "--out", out)
    assert ends_with(export_cli.export_command, *arguments, "--details") == 0
    text = capsys.readouterr().out
    for said in ("OpenVINO fp16", "model.xml, model.bin", "fp16: 11 Convolution, 13 MatMul"):
        assert said in text
    assert ends_with(verify_cli.verify_command, out) == 0
    assert "openvino on cpu" in capsys.readouterr().out


def test_predictions_keep_what_was_compiled_where_they_are_told(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, tmp_path: Path
) -> None:
    with_openvino(bundle, tmp_path / "bundle", "int8")
    named = ("--format", "openvino", "--cache", tmp_path / "c")
    for _ in range(2):
        assert ends_with(predict_cli.predict_command, tmp_path / "bundle", *SAMPLES, *named) == 0
        out, err = capsys.readouterr()
        assert "openvino on cpu" in out
        assert err == ""
    assert len(list((tmp_path / "c").iterdir())) == 1
    (tmp_path / "file").write_text("x")
    assert ends_with(predict_cli.predict_command, tmp_path / "bundle", *SAMPLES, "--cache", tmp_path / "file") == 5


def test_an_artifact_that_was_passed_over_is_named_on_stderr(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_openvino(bundle, tmp_path / "bundle")
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "repmlp_deploy.runtime.openvino.runner", raising=False)
    assert ends_with(predict_cli.predict_command, tmp_path / "bundle", *SAMPLES, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["format"] == "onnx"
    said = (
        'note: the openvino artifact was passed over: openvino is not installed: pip install "repmlp-deploy[openvino]"'
    )
    assert err.strip() == said
