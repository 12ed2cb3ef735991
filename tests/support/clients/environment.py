"""The clients' environment, and what peers need: made once, kept in the folder of what tests download."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from repmlp_deploy.files import locked
from support.pip import run_pip
from support.vendors.packages import cache_root

__all__ = ["environment_python"]

CLIENTS = ("tritonclient[http,grpc]==2.73.0", "kserve==0.21.0", "protobuf<7")


def environment_python(name: str = "clients", packages: tuple[str, ...] = CLIENTS) -> Path:
    """Return the Python of an environment with these packages; it is made where it is missing."""
    folder = cache_root() / f"{name}-{sys.version_info.major}.{sys.version_info.minor}"
    python, done = folder / "bin" / "python", folder / "packages.txt"
    cache_root().mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not done.is_file() or done.read_text() != "\n".join(packages):
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            run_pip("install", "-q", "--disable-pip-version-check", *packages, python=python)
            done.write_text("\n".join(packages))
    return python
