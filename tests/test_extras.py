"""Tests of an extra that is missing skip with the reason, and no other failure does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from repmlp_deploy.errors import MissingDependency
from support.extras import is_missing, reason_to_skip

ROOT = Path(__file__).resolve().parents[1]

SUITE = """
import pytest

def test_module_is_missing():
    import nncf

def test_translated():
    from repmlp_deploy.errors import missing_dependency
    try:
        import nncf
    except ImportError as error:
        raise missing_dependency(error) from None

@pytest.fixture
def quantized():
    import nncf

def test_fixture(quantized):
    pass

def test_another_module():
    import a_module_that_nobody_has

def test_a_failure():
    assert 1 + 1 == 3
"""


def test_only_what_is_missing_skips(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SUITE, encoding="utf-8")
    (tmp_path / "test_whole.py").write_text("import nncf\n\ndef test_it():\n    pass\n", encoding="utf-8")
    script = (
        "import sys, pytest; sys.modules['nncf'] = None; "
        "sys.exit(pytest.main(['-q', '-rsf', '-p', 'conftest', '-p', 'no:cacheprovider', '-c', '/dev/null']))"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert "2 failed, 4 skipped" in done.stdout, done.stdout
    assert 'nncf is not installed: pip install "repmlp-deploy[export]"' in done.stdout.replace("\\n", "")
    assert "nncf is not installed; the extra export brings it" in done.stdout


def test_what_is_installed_is_not_missing() -> None:
    assert not is_missing("numpy")
    assert is_missing("a_module_that_nobody_has")
    assert reason_to_skip(MissingDependency("numpy", "cli")) is None, "installed and broken is a failure"
    assert reason_to_skip(ModuleNotFoundError("no", name="a_module_that_nobody_has")) is None
    assert reason_to_skip(AssertionError()) is None
    assert reason_to_skip(None) is None
