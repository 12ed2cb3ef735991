"""Our second memory back end asks only for what PyCUDA has, built from its sources here.

Boost.Python writes signatures into docstrings in a form of its own: `f( (int)a [, (object)b=None]) -> T :`.
"""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest

from support.vendors.published import list_module, run_beside
from support.vendors.pycuda_build import built_pycuda
from support.vendors.uses import PACKAGE, Use, find, uses, uses_in

pytestmark = pytest.mark.slow

SOURCE = PACKAGE / "runtime" / "tensorrt" / "pycuda_memory.py"
CLASSES = {"cuda": "", "_context": "Context", "allocation": "DeviceAllocation", "stream": "Stream", "found": "Device"}
USES = [use for use in uses([SOURCE], CLASSES) if "__" not in "".join(use.names)]


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    pycuda = built_pycuda()
    return list_module("pycuda.driver", [pycuda.folder], pycuda.libraries, python=pycuda.python)


def counts(function: Any, *, method: bool) -> list[tuple[int, int]]:
    """Return (fewest, most) arguments of every signature in a docstring, without self."""
    found = []
    for line in (function.__doc__ or "").splitlines():
        match = re.match(r"\w+\((.*)\) -> ", line)
        if match:
            needed, _, _ = match[1].partition("[")
            every = len(re.findall(r"\(\w+\)\s*\w+", match[1]))
            found.append((len(re.findall(r"\(\w+\)\s*\w+", needed)) - method, every - method))
    return found


def complaint(driver: ModuleType, use: Use) -> str | None:
    """Say what is wrong with a use; None if nothing is."""
    try:
        value = find(driver, use)
    except AttributeError as error:
        return f"{use}: {error}"
    if use.call is None or value is None:
        return None
    is_class = isinstance(value, type)
    allowed = counts(value.__init__ if is_class else value, method=is_class or use.owner != "")
    given = len(use.call.args) + len(use.call.keywords)
    return None if not allowed or any(a <= given <= b for a, b in allowed) else f"{use}: takes {allowed}"


def test_all_that_our_code_uses_is_there(driver: ModuleType) -> None:
    assert len(USES) > 12
    assert [said for use in USES if (said := complaint(driver, use))] == []


@pytest.mark.parametrize(
    "misuse",
    ["cuda.mem_alloc(1, 2)", "cuda.memcpy_dtod_async(target, source)", "cuda.mem_alloc_async(1)", "_context.push(1)"],
)
def test_misuse_is_noticed(driver: ModuleType, misuse: str) -> None:
    (use,) = uses_in(misuse, CLASSES)
    assert complaint(driver, use)


def test_what_our_code_takes_from_its_objects_is_there(driver: ModuleType) -> None:
    assert isinstance(driver.Stream.handle, property)
    assert counts(driver.DeviceAllocation.free, method=True) == [(0, 0)]
    assert counts(driver.Stream.synchronize, method=True) == [(0, 0)]
    assert "Device" in driver.Context.get_device.__doc__


def test_the_package_is_the_real_one() -> None:
    pycuda = built_pycuda()
    done = run_beside(
        ["-c", "import pycuda.driver as d, pycuda; print(pycuda.VERSION_TEXT, d.Error.__mro__[1].__name__)"],
        [pycuda.folder],
        pycuda.libraries,
        python=pycuda.python,
    )
    assert done.stdout.split() == ["2026.1", "Exception"], done.stderr
