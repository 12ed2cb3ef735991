"""What our code asks of TensorRT-RTX is there, and the stand-ins of these tests have nothing that is not."""

from __future__ import annotations

import inspect
import re
from functools import reduce
from typing import Any

import pytest
import tensorrt_rtx

from support.fakes.cuda_runtime import make_runtime
from support.fakes.gpu import Gpu
from support.fakes.tensorrt import make_tensorrt
from support.vendors.uses import (
    BUILDER_USES,
    CLASSES,
    PACKAGE,
    RUNTIME,
    RUNTIME_USES,
    Use,
    accepts,
    find,
    fits,
    signatures,
    uses,
    uses_in,
)


def test_our_sources_use_what_is_known() -> None:
    """The reader above finds the calls that matter: were it blind, every test here would pass."""
    names = {use.names[0] for use in RUNTIME_USES}
    assert {
        "Runtime",
        "deserialize_cuda_engine",
        "create_execution_context",
        "execute_async_v3",
        "set_tensor_address",
        "set_input_shape",
        "set_optimization_profile_async",
        "create_runtime_config",
        "set_runtime_cache",
        "cuda_graph_strategy",
        "WHOLE_GRAPH_CAPTURE",
        "deserialize",
        "device_memory_size_v2",
    } <= names
    assert {"Builder", "create_network", "build_serialized_network"} <= {use.names[0] for use in BUILDER_USES}
    assert len(RUNTIME_USES) > 30


@pytest.mark.parametrize("use", RUNTIME_USES + BUILDER_USES, ids=str)
def test_what_our_code_uses_exists(use: Use) -> None:
    value = find(tensorrt_rtx, use)
    if use.call is not None and callable(value) and signatures(value):
        assert fits(value, use.call), signatures(value)


def test_what_does_not_exist_is_noticed() -> None:
    (use,) = uses_in("context.execute_async_v4(stream)", CLASSES)
    with pytest.raises(AttributeError):
        find(tensorrt_rtx, use)
    (use,) = uses_in("trt.TensorIOMode.INPUTS", CLASSES)
    with pytest.raises(AttributeError):
        find(tensorrt_rtx, use)


@pytest.mark.parametrize(
    ("method", "positional", "keywords", "fit"),
    [
        ("IExecutionContext.set_input_shape", 2, set(), True),
        ("IExecutionContext.set_input_shape", 1, set(), False),
        ("IExecutionContext.set_tensor_address", 3, set(), False),
        ("IExecutionContext.set_tensor_address", 1, {"memory"}, True),
        ("IExecutionContext.set_tensor_address", 1, {"address"}, False),
        ("ICudaEngine.create_execution_context", 0, {"runtime_config"}, True),
        ("ICudaEngine.create_execution_context", 0, set(), True),
    ],
)
def test_a_call_with_other_parameters_is_noticed(method: str, positional: int, keywords: set[str], fit: bool) -> None:
    overloads = signatures(reduce(getattr, method.split("."), tensorrt_rtx))
    assert overloads
    assert any(accepts(overload, positional, keywords) for overload in overloads) == fit


def members(stand_in: type) -> list[str]:
    return [name for name in vars(stand_in) if not name.startswith("_")]


FAKE = make_tensorrt(Gpu(), "tensorrt_rtx", tensorrt_rtx.__version__, {})
FAKE_CLASSES = {name: value for name, value in vars(FAKE).items() if isinstance(value, type)}


@pytest.mark.parametrize("name", FAKE_CLASSES)
def test_the_stand_in_has_nothing_that_tensorrt_lacks(name: str) -> None:
    real = getattr(tensorrt_rtx, name)
    for member in members(FAKE_CLASSES[name]):
        stand_in, original = getattr(FAKE_CLASSES[name], member), getattr(real, member)
        if inspect.isfunction(stand_in):
            assert signatures(original), f"{name}.{member} has no signature to compare with"
            own = list(inspect.signature(stand_in).parameters)[1:]
            assert any(own == names for names, _ in signatures(original)), (member, own, signatures(original))


def test_the_stand_ins_inputs_and_outputs_are_told_apart_as_tensorrt_does() -> None:
    """Our code compares with one member; the rest must not be it."""
    modes = tensorrt_rtx.TensorIOMode
    assert modes.INPUT != modes.OUTPUT
    assert not tensorrt_rtx.Runtime(tensorrt_rtx.Logger()).engine_host_code_allowed


class TestCudaPython:
    """The default memory back end's package, where it is installed: no GPU is needed to look at it."""

    SOURCE = PACKAGE / "runtime" / "tensorrt" / "cuda_python_memory.py"

    @pytest.fixture
    def cudart(self) -> Any:
        return pytest.importorskip("cuda.bindings.runtime", reason='needs pip install "repmlp-deploy[rtx]"')

    def test_what_our_code_uses_exists(self, cudart: Any) -> None:
        found = list(uses([self.SOURCE], {"cudart": ""}))
        kinds = list(uses([self.SOURCE], {"kinds": "cudaDeviceAttr"}))
        assert len(found) > 25
        assert len(kinds) == 2
        for use in found + kinds:
            value = find(cudart, use)
            if use.call is not None:
                inspect.signature(value).bind(*use.call.args, **{k.arg: k for k in use.call.keywords})

    def test_the_stand_in_has_nothing_that_cuda_python_lacks(self, cudart: Any) -> None:
        stand_in = make_runtime(Gpu())
        for name, value in vars(stand_in).items():
            if not name.startswith("cuda"):
                continue
            original = getattr(cudart, name)
            if isinstance(value, type):
                for member in value:
                    assert int(getattr(original, member.name)) == int(member), member
            elif callable(value):
                own = list(inspect.signature(value).parameters)
                assert own == list(inspect.signature(original).parameters), name
            else:
                assert int(original) == value, name

    def test_without_a_driver_the_back_end_says_so(self, cudart: Any) -> None:
        from repmlp_deploy.errors import MissingDevice
        from repmlp_deploy.runtime.tensorrt.device_memory import open_memory

        if cudart.cudaGetDeviceCount()[0] == cudart.cudaError_t.cudaSuccess:
            pytest.skip("this machine has what the test lacks")
        with pytest.raises(MissingDevice, match=r"no usable NVIDIA driver, .* install or update the driver"):
            open_memory("cuda-python")


PYCUDA = {
    "init": ["flags"],
    "mem_alloc": ["bytes"],
    "pagelocked_empty": ["shape", "dtype", "order", "mem_flags"],
    "memcpy_htod_async": ["dest", "src", "stream"],
    "memcpy_dtoh_async": ["dest", "src", "stream"],
    "memcpy_dtod_async": ["dest", "src", "size", "stream"],
    "Stream": ["flags"],
    "Device": ["ordinal"],
    "Context.push": ["self"],
    "Context.pop": [],
    "Context.get_current": [],
    "Context.get_device": [],
    "Context.synchronize": [],
    "Device.compute_capability": ["self"],
    "Error": [],
}
"""PyCUDA 2026.1's names and parameters, as its manual has them: it cannot be installed without CUDA's headers."""


class TestPyCuda:
    """The other back end's package."""

    SOURCE = PACKAGE / "runtime" / "tensorrt" / "pycuda_memory.py"

    def test_our_code_uses_what_the_manual_has(self) -> None:
        found = {".".join(use.names) for use in uses([self.SOURCE], {"cuda": ""})}
        assert found <= set(PYCUDA)
        assert len(found) > 10

    def test_the_stand_in_has_the_manuals_parameters(self) -> None:
        from support.fakes.pycuda_driver import make_driver

        driver = make_driver(Gpu())
        for name, parameters in PYCUDA.items():
            if name != "Error":
                value = reduce(getattr, name.split("."), driver)
                assert list(inspect.signature(value).parameters) == parameters, name

    def test_the_real_package_agrees_where_it_is_installed(self) -> None:
        driver = pytest.importorskip("pycuda.driver", reason='needs pip install "repmlp-deploy[pycuda]" and CUDA')
        for name in PYCUDA:
            assert reduce(getattr, name.split("."), driver)


def test_every_source_that_touches_a_vendor_is_read() -> None:
    """A new module of the runtime that takes NVIDIA's objects must join the lists above."""
    touching = {
        file
        for file in (PACKAGE / "runtime").rglob("*.py")
        if re.search(
            r"execute_async_v3|deserialize_cuda_engine|create_execution_context|cudart\.|cuda\.mem_", file.read_text()
        )
    }
    assert touching <= {*RUNTIME, TestCudaPython.SOURCE, TestPyCuda.SOURCE}
