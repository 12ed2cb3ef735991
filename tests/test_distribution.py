"""The wheel and the source distribution are well formed, and the package's types reach an outside project."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import repmlp_deploy

pytestmark = pytest.mark.slow  # builds, and type checkers of a whole project

ROOT = Path(__file__).resolve().parents[1]

RIGHT = '''"""A project that uses the package."""
from pathlib import Path

import numpy as np

from repmlp_deploy import Bundle, EngineOptions, Predictor, RepMLPError, export


def made(checkpoint: Path) -> Bundle:
    return export(checkpoint, formats="onnx", engine=EngineOptions(), out="bundle")


def largest(folder: Path) -> int:
    try:
        with Predictor(folder, check=True) as predictor:
            logits = predictor.logits(np.zeros((1, 3, 32, 32), np.float32))
            return int(logits.argmax())
    except RepMLPError as error:
        return error.exit_code
'''

WRONG = """from repmlp_deploy import Predictor

predictor = Predictor(3)
predictor.logitz
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def test_the_index_would_take_the_wheel_and_the_source_distribution(built: Path) -> None:
    files = sorted(map(str, built.iterdir()))
    version = repmlp_deploy.__version__
    assert [Path(file).name for file in files] == [
        f"repmlp_deploy-{version}-py3-none-any.whl",
        f"repmlp_deploy-{version}.tar.gz",
    ]
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_source_distribution_holds_what_a_reader_needs(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "docs/quickstart.md", "examples/README.md"} <= names
    assert "repmlp_deploy/py.typed" in names
    assert not any(name.startswith((".venv", "tests/", "site/", "build/")) for name in names)


@pytest.fixture
def outside(built: Path, tmp_path: Path) -> Path:
    """A project in an environment of its own, where the wheel is installed beside this environment's packages."""
    venv.create(tmp_path / "environment", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "environment" / "lib").glob("python*/site-packages")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    (tmp_path / "project").mkdir()
    return tmp_path


def types_hold(checker: str, outside: Path, text: str) -> tuple[bool, str]:
    """Whether a checker accepts a module of the project, and what it says."""
    module = outside / "project" / "main.py"
    module.write_text(text, encoding="utf-8")
    python = outside / "environment" / "bin" / "python"
    words = {
        "mypy": ["-m", "mypy", "--strict", "--python-executable", str(python), "--cache-dir", str(outside / "cache")],
        "pyright": ["-m", "pyright", "--pythonpath", str(python)],
    }[checker]
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MYPYPATH"}}
    done = subprocess.run(
        [sys.executable, *words, str(module)],
        cwd=module.parent,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    return done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_an_outside_project_sees_the_types(checker: str, outside: Path) -> None:
    pytest.importorskip(checker, reason="the extra dev is not installed")
    passed, said = types_hold(checker, outside, RIGHT)
    assert passed, said
    passed, said = types_hold(checker, outside, WRONG)
    assert not passed
    assert "main.py:3" in said
    assert "logitz" in said


def test_without_its_marker_the_package_would_be_untyped(outside: Path) -> None:
    """What the test above proves is due to `py.typed`: without it mypy knows no types."""
    (marker,) = (outside / "environment").rglob("repmlp_deploy/py.typed")
    marker.unlink()
    passed, said = types_hold("mypy", outside, RIGHT)
    assert not passed
    assert "py.typed" in said
