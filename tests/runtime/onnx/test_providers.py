"""ONNX Runtime's providers: what was asked for is had or refused. What needs no GPU of it, on a stand-in session."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.errors import InputError, MissingDependency, MissingDevice
from repmlp_deploy.runtime.onnx import providers as onnx_providers
from repmlp_deploy.runtime.onnx.providers import PROVIDERS
from repmlp_deploy.runtime.onnx.runner import OnnxRunner
from repmlp_deploy.runtime.runner import RunnerOptions

GPUS = [name for name in PROVIDERS if name != "cpu"]


class Runtime:
    """ONNX Runtime as it would be on a GPU machine: sessions run on the CPU, and say what they are told to say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.library: list[tuple[str, str]] = []
        self.added: list[tuple[list[Any], dict[str, str]]] = []
        self.devices: list[Any] = []
        self.starts = True
        self.fallback_disabled = False
        names = [PROVIDERS["tensorrt"].name, PROVIDERS["cuda"].name, PROVIDERS["cpu"].name]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
        monkeypatch.setattr(onnxruntime, "InferenceSession", self._session(onnxruntime.InferenceSession))
        monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: self.devices, raising=False)
        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", self._register, raising=False)
        monkeypatch.setattr(onnx_providers, "_registered", set())
        monkeypatch.setattr(onnxruntime, "SessionOptions", self._options(onnxruntime.SessionOptions))
        module = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
        module.get_library_path = lambda: "/plugin/library.so"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.delitem(sys.modules, "repmlp_deploy.runtime.onnx.rtx_plugin", raising=False)

    def _register(self, name: str, path: str) -> None:
        self.library.append((name, path))

    def _options(self, real: type) -> type:
        runtime = self

        class Options(real):
            def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
                runtime.added.append((devices, options))

        return Options

    def _session(self, real: type) -> type:
        runtime = self

        class Session(real):
            def __init__(self, model: bytes, settings: Any, providers: list[Any] | None = None) -> None:
                runtime.asked.append(providers)
                self._said = [p if isinstance(p, str) else p[0] for p in providers or []]
                self._said = self._said or [runtime.added[-1][0][0].ep_name, PROVIDERS["cpu"].name]
                super().__init__(model, settings, providers=[PROVIDERS["cpu"].name])

            def get_providers(self) -> list[str]:
                return self._said if runtime.starts else [PROVIDERS["cpu"].name]

            def disable_fallback(self) -> None:
                runtime.fallback_disabled = True

        return Session


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime(monkeypatch)
    made.devices = [types.SimpleNamespace(ep_name=name) for name in ("CPUExecutionProvider", PROVIDERS["rtx"].name)]
    return made


@pytest.mark.parametrize("device", GPUS)
def test_the_provider_that_was_asked_for_comes_first_and_alone_counts(
    device: str, runtime: Runtime, bundle: Bundle
) -> None:
    runner = OnnxRunner(bundle, RunnerOptions(device=device))
    assert runner.device == device
    assert runner.details["providers"][0] == PROVIDERS[device].name
    assert runtime.fallback_disabled
    assert runner.run(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)


@pytest.mark.parametrize("device", GPUS)
def test_a_silent_fall_back_to_the_cpu_is_refused(device: str, runtime: Runtime, bundle: Bundle) -> None:
    runtime.starts = False
    with pytest.raises(MissingDevice, match=f"could not start {PROVIDERS[device].name}, only CPUExecutionProvider"):
        OnnxRunner(bundle, RunnerOptions(device=device))


def test_the_default_device_that_does_not_start_is_said_to_be_the_cpu(runtime: Runtime, bundle: Bundle) -> None:
    """Nobody asked for a GPU: the CPU serves, and the runner says so."""
    assert OnnxRunner(bundle, RunnerOptions()).device == "cuda"
    runtime.starts = False
    assert OnnxRunner(bundle, RunnerOptions()).device == "cpu"


def test_tensorrt_has_cuda_and_the_cpu_behind_it_and_keeps_its_engines(
    runtime: Runtime, bundle: Bundle, tmp_path: Path
) -> None:
    OnnxRunner(bundle, RunnerOptions(device="tensorrt", cache=tmp_path))
    (name, options), *behind = runtime.asked[-1]
    assert (name, behind) == ("TensorrtExecutionProvider", ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)
    OnnxRunner(bundle, RunnerOptions(device="tensorrt"))
    assert runtime.asked[-1][0] == ("TensorrtExecutionProvider", {})


def test_the_plugin_is_registered_once_and_gets_its_devices_alone(
    runtime: Runtime, bundle: Bundle, tmp_path: Path
) -> None:
    for _ in range(2):
        OnnxRunner(bundle, RunnerOptions(device="rtx", cache=tmp_path))
    assert runtime.library == [("NvTensorRTRTXExecutionProvider", str(Path("/plugin/library.so")))]
    assert runtime.asked == [None, None]
    devices, options = runtime.added[-1]
    assert [device.ep_name for device in devices] == ["NvTensorRTRTXExecutionProvider"]
    assert options == {"nv_runtime_cache_path": str(tmp_path)}


def test_a_plugin_without_a_gpu_says_so(runtime: Runtime, bundle: Bundle) -> None:
    runtime.devices = runtime.devices[:1]
    with pytest.raises(MissingDevice, match="finds no NVIDIA RTX GPU"):
        OnnxRunner(bundle, RunnerOptions(device="rtx"))


def test_a_plugin_that_cannot_be_loaded_names_what_it_lacks(
    runtime: Runtime, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_name: str, _path: str) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Failed to load x.so with error: libcudart.so.12: none")

    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", fail)
    with pytest.raises(MissingDevice, match=r"cannot load Nv\w+: libcudart.so.12: none: install the NVIDIA driver"):
        OnnxRunner(bundle, RunnerOptions(device="rtx"))
    assert not runtime.asked


def test_a_missing_plugin_names_its_extra(runtime: Runtime, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(MissingDependency, match=r'pip install "repmlp-deploy\[ort-rtx\]"'):
        OnnxRunner(bundle, RunnerOptions(device="rtx"))
    assert not runtime.asked


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_build_without_the_provider_names_the_other_package(device: str, bundle: Bundle) -> None:
    if PROVIDERS[device].name in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has what the test lacks")
    with pytest.raises(MissingDevice, match=rf'has no {PROVIDERS[device].name}, .*pip install "repmlp-deploy\[gpu\]"'):
        Predictor(bundle, format="onnx", device=device)


def test_an_unknown_device_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="'gpu'; expected one of cpu, cuda, tensorrt, rtx"):
        OnnxRunner(bundle, RunnerOptions(device="gpu"))


def test_onnx_runtime_has_the_calls_that_plugins_need() -> None:
    """Before the fixtures of this file put stand-ins in their place."""
    assert callable(onnxruntime.register_execution_provider_library)
    assert callable(onnxruntime.get_ep_devices)
    assert callable(onnxruntime.SessionOptions.add_provider_for_devices)
    assert callable(onnxruntime.InferenceSession.disable_fallback)
