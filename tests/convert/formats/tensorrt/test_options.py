"""Options of engines: what is refused, with which reason, and before anything is built."""

from __future__ import annotations

import ctypes
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorrt_rtx

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.engine_options import FLAGS, EngineOptions, parse_capabilities, with_profiles
from repmlp_deploy.convert.formats.tensorrt import flavours
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS, check_options, creation_flags
from repmlp_deploy.convert.options import parse_profiles, whole_range
from repmlp_deploy.errors import BuildError, InputError, MissingDevice
from repmlp_deploy.runtime.tensorrt import driver
from repmlp_deploy.runtime.tensorrt.driver import Gpu, find_gpus

AMPERE = (Gpu("a GPU", "8.6"),)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavours, "find_gpus", tuple)


@pytest.fixture
def trt_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trt flavour with the other one's module, on a machine with a GPU."""
    stand_in = replace(FLAVOURS["trt"], module="tensorrt_rtx", oldest=(1, 0))
    monkeypatch.setitem(flavours.FLAVOURS, "trt", stand_in)
    monkeypatch.setattr(flavours, "find_gpus", lambda: AMPERE)


def test_every_option_has_a_word_on_the_command_line() -> None:
    assert set(FLAGS) == {field.name for field in fields(EngineOptions)}


def test_only_what_differs_from_the_default_was_asked_for() -> None:
    assert EngineOptions().asked() == ()
    assert EngineOptions(tf32=True, workspace_gb=2).asked() == ("workspace_gb", "tf32")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"workspace_gb": 0.0}, "--workspace-gb is 0; expected a positive number"),
        ({"workspace_gb": float("nan")}, "--workspace-gb is nan"),
        ({"optimization_level": 6}, "--optimization-level is 6; expected 0 to 5"),
        ({"verbosity": "inof"}, "--verbosity inof: unknown; did you mean info"),
    ],
)
def test_values_that_no_flavour_takes_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        EngineOptions(**wrong)


def test_capabilities_are_read_without_repetition() -> None:
    assert parse_capabilities("8.6, 12.0,8.6") == ("8.6", "12.0")
    for wrong in ("8", "8.6,", "86", "sm_86", "8.6 8.9", "0.6"):
        with pytest.raises(InputError, match="--compute-capability"):
            parse_capabilities(wrong)


def test_several_ranges_are_profiles_of_one_whole() -> None:
    profiles = parse_profiles("1:1:1,2:8:64")
    assert profiles == (BatchRange(min=1, opt=1, max=1), BatchRange(min=2, opt=8, max=64))
    assert whole_range(profiles) == BatchRange(min=1, opt=8, max=64)
    assert whole_range(parse_profiles("4")) == BatchRange(min=4, opt=4, max=4)
    assert with_profiles(EngineOptions(), profiles).profiles == profiles
    own = EngineOptions(profiles=profiles[:1])
    assert with_profiles(own, profiles) is own


def test_ranges_that_leave_out_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"--batch 8:8:16,1:1:2 leaves out sizes 3 to 7"):
        parse_profiles("8:8:16,1:1:2")
    with pytest.raises(InputError, match="expected MIN:OPT:MAX"):
        parse_profiles("1:1:1,")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (EngineOptions(timing_cache=Path("x")), "trt-rtx has no --timing-cache: it measures nothing"),
        (EngineOptions(version_compatible=True), "trt-rtx has no --version-compatible: its engines run in the release"),
        (EngineOptions(hardware_compatible=True), "trt-rtx has no --hardware-compatible: name the GPUs"),
        (EngineOptions(compute_capabilities=("9.9",)), r"cannot build for 9.9; it can for 7.5, 8.0, 8.6"),
    ],
)
def test_what_rtx_lacks_is_refused_with_the_reason(options: EngineOptions, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_options("trt-rtx", options)


@pytest.mark.usefixtures("trt_here")
def test_trt_builds_for_the_gpu_at_hand() -> None:
    with pytest.raises(InputError, match="trt has no --compute-capability: it builds for the GPU at hand"):
        check_options("trt", EngineOptions(compute_capabilities=("8.6",)))
    assert check_options("trt", EngineOptions(version_compatible=True, refittable=True)) is tensorrt_rtx


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("option", ["refittable", "strip_weights"])
def test_what_needs_a_gpu_says_so_before_the_build(option: str) -> None:
    with pytest.raises(MissingDevice, match=rf"builds without a GPU, but {FLAGS[option]} needs an NVIDIA driver"):
        check_options("trt-rtx", EngineOptions(**{option: True}))


@pytest.mark.parametrize("option", ["refittable", "strip_weights"])
def test_with_a_gpu_the_same_is_no_problem(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr(flavours, "find_gpus", lambda: AMPERE)
    assert check_options("trt-rtx", EngineOptions(**{option: True})) is tensorrt_rtx


def test_no_timing_cache_may_be_said_where_there_is_none() -> None:
    assert check_options("trt-rtx", EngineOptions(timing_cache="off")) is tensorrt_rtx


@pytest.mark.usefixtures("trt_here")
def test_an_option_that_the_version_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = SimpleNamespace(__version__="10.13.0", BuilderFlag=SimpleNamespace(TF32=0), MemoryPoolType=SimpleNamespace())
    monkeypatch.setattr(flavours, "import_module", lambda _name: poor)
    assert check_options("trt", EngineOptions(tf32=True)) is poor
    with pytest.raises(InputError, match=r"10.13.0 has no --refittable: it has no BuilderFlag.REFIT"):
        check_options("trt", EngineOptions(refittable=True))
    with pytest.raises(InputError, match=r"has no --workspace-gb: it has no MemoryPoolType.WORKSPACE"):
        check_options("trt", EngineOptions(workspace_gb=1))


def test_a_version_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavours, "find_gpus", lambda: AMPERE)
    monkeypatch.setattr(flavours, "import_module", lambda _name: SimpleNamespace(__version__="10.3.0.post1"))
    with pytest.raises(BuildError, match=r"tensorrt is 10.3.0.post1; 10.13 is the oldest.*repmlp-deploy\[trt\]"):
        check_options("trt", EngineOptions())


def test_creation_flags_are_asked_of_the_module() -> None:
    """TensorRT 10 has both flags, 11 may have neither."""

    class Ten:
        EXPLICIT_BATCH, STRONGLY_TYPED = 0, 3

    assert creation_flags(SimpleNamespace(NetworkDefinitionCreationFlag=Ten)) == 0b1001
    assert creation_flags(SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace())) == 0


class Driver:
    """A CUDA driver with two GPUs, called as ctypes calls it."""

    def __init__(self, count: int = 2, *, ready: int = 0) -> None:
        self.count, self.ready = count, ready

    def cuInit(self, _flags: int) -> int:
        return self.ready

    def cuDeviceGetCount(self, count: object) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: object, index: int) -> int:
        device._obj.value = 10 + index
        return 0

    def cuDeviceGetName(self, name: object, _length: int, device: object) -> int:
        name.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: object) -> int:
        value._obj.value = {75: 8, 76: 6 if device.value == 10 else 9}[attribute]
        return 0


def test_gpus_are_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _name: Driver())
    assert find_gpus() == (Gpu("GPU 10", "8.6"), Gpu("GPU 11", "8.9"))


@pytest.mark.parametrize("broken", [Driver(count=0), Driver(ready=100)])
def test_a_driver_without_a_gpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch, broken: Driver) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _name: broken)
    assert find_gpus() == ()


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> ctypes.CDLL:
        raise OSError("no such library")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    assert find_gpus() == ()
