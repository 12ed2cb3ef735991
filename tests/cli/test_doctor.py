"""`repmlp-doctor` says what works here, and how to get the rest."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from repmlp_deploy import Bundle
from repmlp_deploy.cli.doctor import doctor_command
from repmlp_deploy.cli.shared import capabilities
from repmlp_deploy.cli.shared.capabilities import EXTRAS_FOR, describe_cpu, find_capabilities, find_extras
from repmlp_deploy.errors import EXTRAS
from repmlp_deploy.runtime import cpus
from support.commands import ends_with
from support.openvino_bundle import with_openvino

ROOT = Path(__file__).resolve().parents[2]


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


def test_an_openvino_model_is_exported_with_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = {one.name: one for one in find_capabilities()}
    assert found["run openvino"].works
    assert not found["export openvino"].works
    assert "repmlp-deploy[export]" in found["export openvino"].details


def test_the_table_fits_and_names_the_processor(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(doctor_command) == 0
    out = capsys.readouterr().out
    assert str(describe_cpu()["cores_allowed"]) in out
    assert "this machine can" in out
    assert all(f" {name} " in out for name in EXTRAS_FOR)
    assert "to add one, here timm: pip install" in out


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/pods/box\n", {"pods/cpu.max": "150000 100000", "pods/box/cpu.max": "max 100000"}),
        ("4:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "150000", "cpu/box/cpu.cfs_period_us": "100000"}),
    ],
)
def test_a_quota_of_any_group_around_the_process_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str]
) -> None:
    (tmp_path / "self").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(cpus, "_PROC", tmp_path / "self")
    monkeypatch.setattr(cpus, "_GROUPS", tmp_path / "cgroup")
    assert describe_cpu()["cpu_quota"] == 1.5


def test_the_artifacts_of_a_bundle_are_measured(
    capsys: pytest.CaptureFixture[str], bundle: Bundle, tmp_path: Path
) -> None:
    with_openvino(bundle, tmp_path / "bundle")
    assert ends_with(doctor_command, tmp_path / "bundle", "--json") == 0
    said = json.loads(capsys.readouterr().out)["bundle"]
    assert set(said["artifacts"]) == {"onnx", "openvino"}
    assert set(said["artifacts"]["onnx"]["batch_ms"]) == {"1", "4"}
    assert said["chosen"].startswith("openvino: the first in order")
    assert ends_with(doctor_command, bundle.folder) == 0
    out = capsys.readouterr().out
    assert "repmlp-digits here" in out
    assert "artifact: onnx" in out
    assert ends_with(doctor_command, tmp_path) == 2


def test_every_extra_of_the_project_is_listed_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert EXTRAS_FOR.keys() == project["optional-dependencies"].keys()
    assert set(EXTRAS.values()) <= EXTRAS_FOR.keys()
    there = {one.name: one for one in find_extras()}
    assert (there["cli"].missing, there["cli"].remedy) == ((), "")

    def without_pyarrow(name: str) -> str:
        if name in {"pyarrow", "uvloop"}:
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(capabilities, "version", without_pyarrow)
    missing = {one.name: one for one in find_extras() if one.missing}
    assert {name: one.missing for name, one in missing.items()} == {
        "serve": ("uvloop",),
        "map": ("pyarrow",),
        "ray": ("pyarrow", "uvloop"),
    }
    assert missing["map"].remedy.endswith('[map]"')
    installed = [f'{one}; extra == "map"' for one in project["optional-dependencies"]["map"]]
    monkeypatch.setattr(capabilities, "requires", lambda _: [*installed, 'rich>=13.7; extra == "cli"', "numpy>=1.26"])
    monkeypatch.setattr(capabilities, "__file__", "/nowhere/repmlp_deploy/cli/shared/capabilities.py")
    assert [one.name for one in find_extras() if one.missing] == ["map"], "an installed package reads its metadata"
