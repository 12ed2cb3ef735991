"""Child processes import the copy of this package that started them, whether it is installed or lies in a checkout."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["child_environment"]

_INSTALLED = ("site-packages", "dist-packages")


def child_environment(**changes: str) -> dict[str, str]:
    """Return the environment for a child that runs `python -P -m repmlp_deploy…`.

    `-P` keeps modules of the working folder out of the child, and with them a checkout that is run from its root. Its
    folder is named first, unless the child finds it by itself: there, other packages would come before Python's own.

    Args:
        changes: variables to set.
    """
    folder = Path(__file__).resolve().parents[1]
    if folder.name not in _INSTALLED:
        given = os.environ.get("PYTHONPATH")
        changes["PYTHONPATH"] = f"{folder}{os.pathsep}{given}" if given else str(folder)
    return {**os.environ, **changes}
