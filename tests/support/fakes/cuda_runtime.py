"""`cuda.bindings.runtime` on the simulated GPU: the functions that the back end calls, with their real parameters."""

from __future__ import annotations

import enum
import types
from typing import Any

from support.fakes.gpu import Gpu


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


_MODES = {
    cudaStreamCaptureMode.cudaStreamCaptureModeGlobal: "global",
    cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal: "thread-local",
}

_TEXTS = {
    cudaError_t.cudaSuccess: b"no error",
    cudaError_t.cudaErrorMemoryAllocation: b"out of memory",
    cudaError_t.cudaErrorInsufficientDriver: b"CUDA driver version is insufficient for CUDA runtime version",
}


class Runtime:
    """The functions; an instance a GPU, because a module has but one."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def cudaGetErrorString(self, error):
        return cudaError_t.cudaSuccess, _TEXTS[error]

    def cudaGetDeviceCount(self):
        return self._give("cudaGetDeviceCount", lambda: self.gpu.devices)

    def cudaDeviceGetAttribute(self, attr, device):
        index = int(attr) - int(cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor)
        return self._give("cudaDeviceGetAttribute", lambda: self.gpu.capability[index])

    def cudaSetDevice(self, device):
        return self._do("cudaSetDevice", lambda: None)

    def cudaMalloc(self, size):
        return self._give("cudaMalloc", lambda: self.gpu.allocate(size))

    def cudaFree(self, devPtr):
        return self._do("cudaFree", lambda: self.gpu.free(devPtr))

    def cudaMallocHost(self, size):
        return self._give("cudaMallocHost", lambda: self.gpu.allocate_pinned(size).ctypes.data)

    def cudaFreeHost(self, ptr):
        return self._do("cudaFreeHost", lambda: self.gpu.free_pinned(ptr))

    def cudaStreamCreateWithFlags(self, flags):
        return self._give("cudaStreamCreateWithFlags", self.gpu.create_stream)

    def cudaStreamDestroy(self, stream):
        return self._do("cudaStreamDestroy", lambda: self.gpu.destroy_stream(stream))

    def cudaStreamSynchronize(self, stream):
        return self._do("cudaStreamSynchronize", lambda: self.gpu.synchronize(stream))

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        copy = {
            cudaMemcpyKind.cudaMemcpyHostToDevice: self.gpu.copy_in,
            cudaMemcpyKind.cudaMemcpyDeviceToHost: self.gpu.copy_out,
            cudaMemcpyKind.cudaMemcpyDeviceToDevice: self.gpu.copy_within,
        }[kind]
        return self._do("cudaMemcpyAsync", lambda: copy(dst, src, count, stream))

    def cudaEventCreateWithFlags(self, flags):
        return self._give("cudaEventCreateWithFlags", self.gpu.create_event)

    def cudaEventRecord(self, event, stream):
        return self._do("cudaEventRecord", lambda: self.gpu.record_event(event, stream))

    def cudaStreamWaitEvent(self, stream, event, flags):
        return self._do("cudaStreamWaitEvent", lambda: self.gpu.wait_event(stream, event))

    def cudaEventDestroy(self, event):
        return self._do("cudaEventDestroy", lambda: self.gpu.destroy_event(event))

    def cudaStreamBeginCapture(self, stream, mode):
        return self._do("cudaStreamBeginCapture", lambda: self.gpu.begin_capture(stream, _MODES[mode]))

    def cudaStreamEndCapture(self, stream):
        return self._give("cudaStreamEndCapture", lambda: self.gpu.end_capture(stream))

    def cudaGraphInstantiate(self, graph, flags):
        return self._give("cudaGraphInstantiate", lambda: self.gpu.instantiate(graph))

    def cudaGraphLaunch(self, graphExec, stream):
        return self._do("cudaGraphLaunch", lambda: self.gpu.launch(graphExec, stream))

    def cudaGraphDestroy(self, graph):
        return self._do("cudaGraphDestroy", lambda: self.gpu.destroy_graph(graph))

    def cudaGraphExecDestroy(self, graphExec):
        return self._do("cudaGraphExecDestroy", lambda: self.gpu.destroy_graph(graphExec))

    def _status(self, name: str) -> cudaError_t:
        if not self.gpu.devices:
            return cudaError_t.cudaErrorInsufficientDriver
        return cudaError_t(self.gpu.failing.get(name, 0))

    def _give(self, name: str, make: Any) -> tuple[cudaError_t, Any]:
        status = self._status(name)
        return status, None if status else make()

    def _do(self, name: str, act: Any) -> tuple[cudaError_t]:
        status = self._status(name)
        if not status:
            act()
        return (status,)


def make_runtime(gpu: Gpu) -> types.ModuleType:
    """The module."""
    module = types.ModuleType("cuda.bindings.runtime")
    runtime = Runtime(gpu)
    for name in dir(runtime):
        if name.startswith("cuda"):
            setattr(module, name, getattr(runtime, name))
    for kind in (cudaError_t, cudaDeviceAttr, cudaMemcpyKind, cudaStreamCaptureMode):
        setattr(module, kind.__name__, kind)
    module.cudaStreamNonBlocking = 1
    module.cudaEventDisableTiming = 2
    return module
