"""Download published wheels into a cached folder and unpack them, without their dependencies.

The folder is `$REPMLP_TEST_CACHE`, or `repmlp-deploy/tests` in the user's cache folder. Continuous integration keeps
it between runs. Several test processes may share it: each wheel appears under its final name when it is complete.
"""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

from repmlp_deploy.files import locked
from support.pip import run_pip


def cache_root() -> Path:
    """Return the folder that keeps what tests download or build."""
    given = os.environ.get("REPMLP_TEST_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else user / "repmlp-deploy" / "tests"


@cache
def unpacked(*requirements: str) -> Path:
    """Return a folder with the content of these wheels, such as `polygraphy==0.53.6`.

    The calling test is skipped if the wheels cannot be downloaded here.
    """
    tag = f"{sys.implementation.cache_tag}-{'+'.join(requirements).replace('==', '-')}"
    folder = cache_root() / "wheels" / tag
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not folder.is_dir():
            _download(requirements, folder)
    return folder


def _download(requirements: tuple[str, ...], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        quietly = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
        try:
            run_pip("download", *quietly, "--dest", work, *requirements)
        except RuntimeError as error:
            pytest.skip(f"pip cannot download {', '.join(requirements)}: {str(error).strip().splitlines()[-1]}")
        content = Path(work, "content")
        for wheel in Path(work).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(content)
        content.rename(folder)
