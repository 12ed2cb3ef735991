"""The rooms stay small, and every module has its tests: in a file of its name, by import, or in one of a table."""

from __future__ import annotations

from pathlib import Path

import pytest

import house


def test_no_room_is_too_large_and_no_module_without_a_test() -> None:
    assert list(house.faults()) == []


def test_the_table_names_modules_and_files_that_exist() -> None:
    tests = Path(__file__).parent
    for module, file in house.COVERED_BY.items():
        assert (house.ROOT / Path(*module.split("."))).with_suffix(".py").is_file(), module
        assert (tests / file).is_file(), file


def test_a_large_room_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "repmlp_deploy"
    package.mkdir()
    (tmp_path / "tests").mkdir()
    for i in range(house.MOST_MODULES + 1):
        (package / f"m{i}.py").write_text("")
    (package / "m0.py").write_text("def long():\n" + "    pass\n" * (house.MOST_MODULE_LINES + 1))
    monkeypatch.setattr(house, "ROOT", tmp_path)
    monkeypatch.setattr(house, "PACKAGE", package)
    found = list(house.faults())
    assert "repmlp_deploy: 13 modules; at most 12" in found
    assert any("m0.py: 402 lines" in line for line in found)
    assert any("m0.py:1 long: 401 lines" in line for line in found)
    assert any("m5.py: no test file" in line for line in found)


def test_a_module_has_a_test_or_an_entry_in_the_table_and_never_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("repmlp_deploy", "tests"):
        (tmp_path / folder).mkdir()
    for name in ("alone", "covered", "both"):
        (tmp_path / "repmlp_deploy" / f"{name}.py").write_text("")
    (tmp_path / "tests" / "test_rest.py").write_text("from repmlp_deploy.both import name\n")
    monkeypatch.setattr(house, "ROOT", tmp_path)
    monkeypatch.setattr(house, "PACKAGE", tmp_path / "repmlp_deploy")
    table = dict.fromkeys(("repmlp_deploy.covered", "repmlp_deploy.both"), "test_rest.py")
    monkeypatch.setattr(house, "COVERED_BY", table)
    assert list(house.faults()) == [
        "repmlp_deploy/alone.py: no test file has its name or imports it",
        "repmlp_deploy/both.py: a test has its name or imports it, and it is in COVERED_BY; remove it there",
    ]
