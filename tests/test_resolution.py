"""What pip makes of the extras: the runtime's stay small, and engines go with either release of cuda-python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.pip import run_pip

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "nncf", "scipy", "scikit-learn", "networkx", "onnxscript"}

pytestmark = pytest.mark.slow  # an index answers, and nothing is installed


def resolved(tmp_path: Path, *requirements: str) -> dict[str, str]:
    """The packages and versions that a clean environment would get."""
    report = tmp_path / "report.json"
    run_pip("install", "--dry-run", "--quiet", "--ignore-installed", "--report", report, *requirements, cwd=ROOT)
    installed = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in installed}


def test_the_extras_of_the_runtime_bring_the_commands_and_nothing_heavy(tmp_path: Path) -> None:
    found = resolved(tmp_path, ".[cpu,openvino]")
    assert {"onnxruntime", "openvino", "typer", "rich", "numpy", "pillow", "pydantic"} <= set(found)
    assert not HEAVY & set(found)


def test_the_constraints_go_with_pytorch_as_the_index_has_it(tmp_path: Path) -> None:
    """Its CUDA build brings packages that a CPU build does not need."""
    target = ("--python-version", "3.12", "--only-binary", ":all:", "--target", str(tmp_path / "packages"))
    found = resolved(tmp_path, *target, "-c", "constraints.txt", "torch", "torchvision", "cuda-python")
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    assert {name: found[name] for name in ("torch", "torchvision", "cuda-python")} == {
        name: pins[name] for name in ("torch", "torchvision", "cuda-python")
    }


@pytest.mark.parametrize(("pin", "major"), [("cuda-python>=13", "13"), ("cuda-python<13", "12")])
def test_engines_go_with_either_release_of_cuda_python(tmp_path: Path, pin: str, major: str) -> None:
    found = resolved(tmp_path, ".[rtx]", pin)
    assert found["cuda-python"].split(".")[0] == major
    assert "tensorrt-rtx-cu12" in found
