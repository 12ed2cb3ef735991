"""ONNX Runtime's execution providers: what each device name stands for, and how a session is opened on it.

A provider that is not in ONNX Runtime is refused here, before the session; whether the session really got it is for the
caller to compare with `get_providers()`, because ONNX Runtime falls back to the CPU and only logs it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from repmlp_deploy.errors import MissingDependency, MissingDevice, installation_of

try:
    import onnxruntime as ort
except ImportError:
    raise MissingDependency("onnxruntime", "cpu") from None

__all__ = ["COMPILING", "PROVIDERS", "Provider", "open_provider_session"]


def _no_options(_cache: Path | None) -> dict[str, str]:
    return {}


def _cuda_options(_cache: Path | None) -> dict[str, str]:
    """Return options that keep float32 products in float32: the provider would use TF32, which was not verified."""
    return {"use_tf32": "0"}


def _tensorrt_options(cache: Path | None) -> dict[str, str]:
    """Return options that cache the engines, which take minutes to build at the first inference of a shape."""
    if cache is None:
        return {}
    engines = {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(cache)}
    return engines | {"trt_timing_cache_enable": "True", "trt_timing_cache_path": str(cache)}


def _rtx_options(cache: Path | None) -> dict[str, str]:
    return {} if cache is None else {"nv_runtime_cache_path": str(cache)}


@dataclass(frozen=True)
class Provider:
    """What a device name stands for.

    Attributes:
        name: ONNX Runtime's, and what `get_providers()` must begin with.
        behind: the providers that take what it leaves, in their order.
        plugin: our module that knows the package which brings it, where ONNX Runtime is not built with it.
        make_options: the provider's options for a cache folder.
    """

    name: str
    behind: tuple[str, ...] = ()
    plugin: str | None = None
    make_options: Callable[[Path | None], dict[str, str]] = _no_options


PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider"),
    "cuda": Provider("CUDAExecutionProvider", ("CPUExecutionProvider",), make_options=_cuda_options),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        ("CUDAExecutionProvider", "CPUExecutionProvider"),
        make_options=_tensorrt_options,
    ),
    "rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        ("CPUExecutionProvider",),
        plugin="repmlp_deploy.runtime.onnx.rtx_plugin",
        make_options=_rtx_options,
    ),
}
"""Device name to execution provider."""

COMPILING = ("tensorrt", "rtx")
"""Those that compile nodes: ONNX Runtime cannot write a graph that has any, and they have caches of their own."""


def open_provider_session(
    model: bytes, settings: ort.SessionOptions, device: str, cache: Path | None = None
) -> ort.InferenceSession:
    """Open a session with the provider of `device` first.

    Args:
        model: a serialized ONNX graph.
        settings: of the session; a plugin's devices are added to them.
        device: an entry of `PROVIDERS`.
        cache: folder for what the provider compiles.

    Raises:
        MissingDependency: the provider is a plugin that is not installed.
        MissingDevice: ONNX Runtime is not built with it, or it finds no device.
    """
    provider = PROVIDERS[device]
    options = provider.make_options(cache)
    if provider.plugin is not None:
        settings.add_provider_for_devices(_plugin_devices(provider), options)
        # the plugin's devices are in the settings, and ONNX Runtime takes no second list
        return ort.InferenceSession(model, settings)
    available = ort.get_available_providers()
    if provider.name not in available:
        raise MissingDevice(
            f"ONNX Runtime here has no {provider.name}, only {', '.join(available)}: "
            f"pip uninstall onnxruntime && {installation_of('gpu')}"
        )
    behind = [name for name in provider.behind if name in available]
    return ort.InferenceSession(model, settings, providers=[(provider.name, options), *behind])


_registering = threading.Lock()
_registered: set[str] = set()


def _plugin_devices(provider: Provider) -> list[Any]:
    """Return the devices that a plugin offers; register it once per process."""
    plugin = import_module(provider.plugin or "")
    with _registering:
        if provider.name not in _registered:
            try:
                ort.register_execution_provider_library(provider.name, os.fspath(plugin.library_path()))
            except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base
                raise MissingDevice(
                    f"ONNX Runtime cannot load {provider.name}: {str(error).splitlines()[0].rpartition('error: ')[2]}: "
                    "install the NVIDIA driver and the CUDA runtime libraries it names"
                ) from None
            _registered.add(provider.name)
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider.name]
    if not devices:
        raise MissingDevice(f"{provider.name} finds no NVIDIA RTX GPU with a driver: use --device cpu")
    return devices
