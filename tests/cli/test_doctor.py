"""`repmlp-doctor` says what works here, and how to get the rest."""

from __future__ import annotations

import json
import sys

import pytest

from repmlp_deploy.cli.doctor import doctor_command
from repmlp_deploy.cli.shared.capabilities import describe_cpu, find_capabilities
from support.commands import ends_with


def test_what_is_installed_works_with_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(doctor_command, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    works = {one["name"]: one for one in report["capabilities"] if one["works"]}
    import onnxruntime

    assert any(onnxruntime.__version__ in one["details"] for name, one in works.items() if "onnx" in name)


def test_what_is_missing_names_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for name in [name for name in sys.modules if name.startswith("repmlp_deploy.runtime.openvino")]:
        monkeypatch.delitem(sys.modules, name)
    missing = [one for one in find_capabilities() if not one.works and "openvino" in one.name.lower()]
    assert missing
    assert "repmlp-deploy[openvino]" in missing[0].details


def test_the_table_fits_and_names_the_processor(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(doctor_command) == 0
    out = capsys.readouterr().out
    assert str(describe_cpu()["cores_allowed"]) in out
    assert "this machine can" in out
