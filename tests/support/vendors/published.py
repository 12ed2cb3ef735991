"""A published module rebuilt from its listing: the same names, signatures and docstrings, and nothing that works.

The tests ask it what they would ask the module itself, in a process that never loads NVIDIA's libraries.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

LISTING = Path(__file__).with_name("listing.py")


def list_module(
    name: str, folders: list[Path], libraries: Path | None = None, *, python: Path | None = None
) -> ModuleType:
    """Import a module in a child process and return it rebuilt from what the child lists.

    Args:
        name: of the module.
        folders: searched for it before everything else.
        libraries: folder that the child's loader searches first.
        python: the child's interpreter; by default this one.
    """
    done = run_beside([str(LISTING), name], folders, libraries, python=python)
    assert done.returncode == 0, done.stderr
    listing = json.loads(done.stdout.splitlines()[-1])
    module = ModuleType(name)
    module.__version__ = listing["version"]  # type: ignore[attr-defined]
    for key, entry in listing["names"].items():
        setattr(module, key, _rebuilt(key, entry))
    return module


def run_beside(
    arguments: list[str], folders: list[Path], libraries: Path | None = None, *, python: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python in a child process that finds modules in `folders` first, and return what it said."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    command = [str(python or sys.executable), "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def _rebuilt(name: str, entry: Mapping[str, Any]) -> Any:
    if entry["kind"] == "class":
        members = {key: _rebuilt(key, member) for key, member in entry.get("members", {}).items()}
        return type(name, (), {**members, "__doc__": entry["doc"]})
    if entry["kind"] == "property":
        return property(doc=entry["doc"])
    if entry["kind"] == "function":
        return _function(name, entry)
    return entry.get("value", entry["doc"])


def _function(name: str, entry: Mapping[str, Any]) -> Any:
    def function(*_: Any, **__: Any) -> None:
        raise NotImplementedError(name)

    function.__name__, function.__doc__ = name, entry["doc"]
    if entry.get("signature") is not None:
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(key, getattr(inspect.Parameter, kind), default=None if optional else inspect._empty)
                for key, kind, optional in entry["signature"]
            ]
        )
    return function
