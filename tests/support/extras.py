"""Tests of an extra that is not installed skip with the reason, instead of failing.

CI installs every extra, so nothing skips there: a package counts as missing only if it cannot be found at all.
"""

from __future__ import annotations

import importlib.util
import sys

from repmlp_deploy.errors import EXTRAS, MissingDependency

__all__ = ["is_missing", "reason_to_skip"]

OF_TESTS = frozenset({"sklearn", "hypothesis", "httpx2", "trustme", "grpc_tools", "nbformat", "IPython", "sphinx"})
"""What tests import beside the extras; the extra `dev` or `docs` brings it."""


def is_missing(package: str) -> bool:
    """Return whether a package is not installed."""
    try:
        return importlib.util.find_spec(package) is None
    except (ValueError, ImportError):  # a test has put something else in its place
        return sys.modules.get(package) is None


def reason_to_skip(error: BaseException | None) -> str | None:
    """Return why a test skips that ended with this error, or None if it failed.

    The error, or one that it came from, must be of an optional package that is not installed.
    """
    while error is not None:
        if isinstance(error, MissingDependency) and error.package and is_missing(error.package):
            return str(error)
        if isinstance(error, ModuleNotFoundError):
            package = (error.name or "").partition(".")[0]
            if package in EXTRAS.keys() | OF_TESTS and is_missing(package):
                return f"{package} is not installed; the extra {EXTRAS.get(package, 'dev')} brings it"
        error = error.__cause__ or error.__context__
    return None
