"""Our default memory back end asks only for what cuda-python 12 and 13 have, in the releases that are published."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from support.fakes.cuda_runtime import make_runtime
from support.fakes.gpu import Gpu
from support.vendors.packages import unpacked
from support.vendors.published import list_module, run_beside
from support.vendors.uses import PACKAGE, Use, find, uses, uses_in

SOURCE = PACKAGE / "runtime" / "tensorrt" / "cuda_python_memory.py"
VERSIONS = ("12.8.0", "12.9.10", "13.5.0")
"""The oldest release of 12 that has wheels, its newest, and the newest of 13."""

CLASSES = {"cudart": "", "kinds": "cudaDeviceAttr"}
USES = list(uses([SOURCE], CLASSES))


def folder(version: str) -> Path:
    return unpacked(f"cuda-bindings=={version}", "cuda-pathfinder==1.9.0")


@cache
def bindings(version: str) -> ModuleType:
    return list_module("cuda.bindings.runtime", [folder(version)])


@pytest.fixture(params=VERSIONS)
def cudart(request: pytest.FixtureRequest) -> ModuleType:
    return bindings(request.param)


def complaint(cudart: ModuleType, use: Use) -> str | None:
    """Say what is wrong with a use; None if nothing is."""
    try:
        value = find(cudart, use)
        if use.call is not None:
            inspect.signature(value).bind(*use.call.args, **{k.arg: k for k in use.call.keywords if k.arg})
    except (AttributeError, TypeError) as error:
        return f"{use}: {error}"
    return None


def test_all_that_our_code_uses_is_there(cudart: ModuleType) -> None:
    assert len(USES) > 25
    assert [said for use in USES if (said := complaint(cudart, use))] == []


@pytest.mark.parametrize(
    "misuse",
    ["cudart.cudaMalloc(1, 2)", "cudart.cudaMemcpyAsync(target, source, size)", "cudart.cudaMallocPinned(1)"],
)
def test_misuse_is_noticed(cudart: ModuleType, misuse: str) -> None:
    (use,) = uses_in(misuse, CLASSES)
    assert complaint(cudart, use)


def test_the_stand_in_has_nothing_that_a_release_lacks(cudart: ModuleType) -> None:
    for name, value in vars(make_runtime(Gpu())).items():
        if not name.startswith("cuda"):
            continue
        original = getattr(cudart, name)
        if isinstance(value, type):
            assert [m for m in value if getattr(original, m.name) != int(m)] == []
        elif callable(value):
            assert list(inspect.signature(value).parameters) == list(inspect.signature(original).parameters), name
        else:
            assert int(original) == value, name


NO_DRIVER = """
from repmlp_deploy.errors import MissingDevice
from repmlp_deploy.runtime.tensorrt.device_memory import open_memory
try:
    open_memory("cuda-python")
except MissingDevice as error:
    print(error)
else:
    print("a driver is here")
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_driver_the_back_end_says_so_with_every_release(version: str) -> None:
    done = run_beside(["-c", NO_DRIVER], [folder(version), PACKAGE.parent])
    if "a driver is here" in done.stdout:
        pytest.skip("this machine has what the test lacks")
    assert "CUDA finds no usable NVIDIA driver" in done.stdout, done.stderr
