"""Nothing is reported to anybody: an empty home stays empty, and a home that cannot be written to is no matter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from repmlp_deploy.card import data_root

DIGIT = data_root() / "samples" / "digits" / "3-0045.png"
WEIGHTS = data_root() / "weights" / "repmlp-digits.safetensors"
INT8 = ("--precision", "int8", "--calibration", data_root() / "samples" / "digits")


def run(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command with this home, as a process that knows nothing of tests: some libraries spare those."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    command = [sys.executable, "-m", "repmlp_deploy", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=home.parent, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_an_empty_home_stays_empty(tmp_path: Path) -> None:
    """Export with every library that reports by itself, NNCF among them; then predict, verify and evaluate."""
    home, bundle, images = tmp_path / "home", tmp_path / "bundle", tmp_path / "images" / "3"
    home.mkdir()
    images.mkdir(parents=True)
    (images / "3.png").write_bytes(DIGIT.read_bytes())
    made = run(home, "export", "--ckpt", WEIGHTS, "--format", "onnx,openvino", "--out", bundle, *INT8)
    assert made.returncode == 0, made.stderr
    for command in (
        ("predict", bundle, DIGIT, "--format", "onnx"),
        ("predict", bundle, DIGIT, "--format", "openvino"),
        ("verify", bundle),
        ("eval", bundle, "--data", images.parent, "--state", tmp_path / "state.json"),
    ):
        done = run(home, *command)
        assert done.returncode == 0, done.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_a_home_that_cannot_be_is_no_matter(tmp_path: Path, bundle_folder: Path) -> None:
    done = run(tmp_path / "nothing", "predict", bundle_folder, DIGIT)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "file").touch()
    done = run(tmp_path / "file", "verify", bundle_folder)
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_package_that_was_loaded_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from repmlp_deploy.privacy import report_nothing

    loaded = type(sys)("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", loaded)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    report_nothing()
    assert sys.modules["openvino_telemetry"] is loaded
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
