"""constraints.txt pins what the extras of `make venv` bring, and nothing else."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CUDA = re.compile(r"nvidia-|cuda-toolkit$|triton$")
"""What PyTorch's CUDA build brings and its CPU build does not."""


def pinned() -> set[str]:
    """The names in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(Requirement(line).name) for line in lines}


def extras() -> set[str]:
    """The extras that `make venv` installs."""
    (found,) = re.findall(r"^EXTRAS := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return set(found.split(","))


def required(name: str, wanted: set[str]) -> Iterator[Requirement]:
    """What a package requires here with these extras; the empty extra is the package without any."""
    if name == PROJECT["name"]:
        lists = [PROJECT["optional-dependencies"][extra] for extra in wanted if extra]
        texts = [*PROJECT["dependencies"], *(text for one in lists for text in one)]
    else:
        texts = importlib.metadata.requires(name) or []
    for one in map(Requirement, texts):
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in wanted):
            yield one


def brought() -> set[str]:
    """The names of all packages that the extras bring here."""
    known: dict[str, set[str]] = {}
    waiting = [(PROJECT["name"], extras())]
    while waiting:
        name, wanted = waiting.pop()
        fresh = (wanted | {""}) - known.setdefault(name, set())
        known[name] |= fresh
        if fresh:
            waiting += [(canonicalize_name(one.name), one.extras) for one in required(name, fresh)]
    return set(known) - {PROJECT["name"]}


@pytest.fixture(scope="module")
def needed() -> set[str]:
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux":
        pytest.skip("constraints.txt is made with Python 3.11 on Linux")
    try:
        return brought()
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: `make venv` brings it")


def test_every_pin_is_of_a_package_that_an_extra_brings(needed: set[str]) -> None:
    assert sorted(pinned() - needed) == []


def test_every_package_that_an_extra_brings_is_pinned(needed: set[str]) -> None:
    assert sorted(name for name in needed - pinned() if not CUDA.match(name)) == []
