"""Cards, labels and weights resolve alike from a checkout, an editable install and a wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import repmlp_deploy
from repmlp_deploy.card import data_root
from support.pip import run_pip

ROOT = Path(__file__).resolve().parents[1]

PROBE = """
import repmlp_deploy
from repmlp_deploy.card import data_root, list_cards, load_card, load_labels
card = load_card("repmlp-digits")
assert (data_root() / card.weights.file).stat().st_size < 2_000_000
assert len(load_labels(load_card("repmlpnet-b224"))) == 1000
print(repmlp_deploy.__file__)
print(data_root())
print(",".join(list_cards()))
"""


def resolved(cwd: Path, **environment: str) -> list[str]:
    child = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return child.stdout.splitlines()


@pytest.mark.slow
def test_data_resolves_from_a_checkout_an_editable_install_and_a_wheel(tmp_path: Path) -> None:
    checkout = resolved(ROOT)
    assert Path(checkout[1]) == ROOT / "models"
    installed = resolved(tmp_path)  # the environment of these tests has an editable install
    assert installed[1:] == checkout[1:]

    run_pip("wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert not any(name.startswith(("models/", "tests/", "tools/")) for name in archive.namelist())
    unpacked = resolved(tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(unpacked[0]) == tmp_path / "site" / "repmlp_deploy" / "__init__.py"
    assert Path(unpacked[1]) == tmp_path / "site" / "repmlp_deploy" / "models"
    assert unpacked[2] == checkout[2]


def test_the_version_is_said_once() -> None:
    import importlib.metadata

    assert importlib.metadata.version("repmlp-deploy") == repmlp_deploy.__version__


def test_the_changelog_has_a_section_for_this_release_and_one_for_the_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\S+?)(?: - \d{4}-\d{2}-\d{2})?$", text, flags=re.MULTILINE)
    assert versions[:2] == ["Unreleased", repmlp_deploy.__version__]


def test_models_holds_data_only() -> None:
    assert not list(data_root().rglob("*.py"))
