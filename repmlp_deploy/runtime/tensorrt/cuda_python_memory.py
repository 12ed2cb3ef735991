"""Device memory through `cuda.bindings` (package cuda-python): the device's primary context, shared with torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from repmlp_deploy.errors import DeviceError, MissingDependency, MissingDevice
from repmlp_deploy.runtime.tensorrt.device_memory import Bytes

try:
    from cuda.bindings import runtime as cudart
except ImportError:
    raise MissingDependency("cuda-python", "rtx") from None

__all__ = ["CudaPythonMemory"]


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    """Return the results of a call without its status; raise if the status is an error.

    Raises:
        DeviceError: it failed.
    """
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        raise DeviceError(f"{call} failed: {_describe(status)}")
    return values[0] if values else None


def _count_devices() -> int:
    """Return how many devices the driver has.

    Raises:
        MissingDevice: there is no usable driver.
    """
    try:
        status, count = cudart.cudaGetDeviceCount()
        failure = None if status == cudart.cudaError_t.cudaSuccess else _describe(status)
    except RuntimeError as error:  # cuda-python 12.8 and earlier, where the driver's library is missing
        count, failure = 0, str(error)
    if failure is not None:
        raise MissingDevice(
            f"CUDA finds no usable NVIDIA driver, {failure}: install or update the driver, "
            "or run the bundle's onnx artifact on the CPU"
        )
    return int(count)


def _describe(status: Any) -> str:
    _, text = cudart.cudaGetErrorString(status)
    return f"{text.decode()} (CUDA error {int(status)})"


class CudaPythonMemory:
    """One device through the CUDA runtime.

    Args:
        device: its index; the first by default.

    Raises:
        MissingDevice: there is no driver, or no such device.
    """

    name = "cuda-python"
    captures = True

    def __init__(self, device: int | None = None) -> None:
        device = 0 if device is None else device
        count = _count_devices()
        if not 0 <= device < count:
            raise MissingDevice(f"CUDA has no device {device}; it has {count}: check CUDA_VISIBLE_DEVICES")
        self._device = device
        kinds = cudart.cudaDeviceAttr
        numbers = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
        major, minor = (
            _checked("cudaDeviceGetAttribute", cudart.cudaDeviceGetAttribute(number, device)) for number in numbers
        )
        self.capability = f"{major}.{minor}"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the device's primary context current in this thread; it stays current."""
        _checked("cudaSetDevice", cudart.cudaSetDevice(self._device))
        yield

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes on the device and return their address."""
        return int(_checked("cudaMalloc", cudart.cudaMalloc(size)))

    def free(self, address: int) -> None:
        """Free the bytes at this address."""
        _checked("cudaFree", cudart.cudaFree(address))

    def allocate_pinned(self, size: int) -> Bytes:
        """Allocate `size` bytes of page-locked host memory."""
        address = int(_checked("cudaMallocHost", cudart.cudaMallocHost(size)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, array: Bytes) -> None:
        """Free the bytes at this address."""
        _checked("cudaFreeHost", cudart.cudaFreeHost(array.ctypes.data))

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        return int(
            _checked(
                "cudaStreamCreateWithFlags",
                cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking),
            )
        )

    def destroy_stream(self, stream: int) -> None:
        """Give it back."""
        _checked("cudaStreamDestroy", cudart.cudaStreamDestroy(stream))

    def copy_in(self, address: int, source: Bytes, stream: int) -> None:
        """Enqueue a copy of pinned host memory to the device."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        result = cudart.cudaMemcpyAsync(address, source.ctypes.data, source.nbytes, kind, stream)
        _checked("cudaMemcpyAsync", result)

    def copy_out(self, target: Bytes, address: int, stream: int) -> None:
        """Enqueue a copy from the device to pinned host memory."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _checked("cudaMemcpyAsync", cudart.cudaMemcpyAsync(target.ctypes.data, address, target.nbytes, kind, stream))

    def copy_within(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy of `size` bytes on the device."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        _checked("cudaMemcpyAsync", cudart.cudaMemcpyAsync(target, source, size, kind, stream))

    def wait_for(self, stream: int, producer: int) -> None:
        """Let `stream` go on after what `producer` has been given so far: an event, the host waits for nothing."""
        event = _checked("cudaEventCreateWithFlags", cudart.cudaEventCreateWithFlags(cudart.cudaEventDisableTiming))
        try:
            _checked("cudaEventRecord", cudart.cudaEventRecord(event, producer))
            _checked("cudaStreamWaitEvent", cudart.cudaStreamWaitEvent(stream, event, 0))
        finally:
            # CUDA keeps what is still waited for
            _checked("cudaEventDestroy", cudart.cudaEventDestroy(event))

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done all it was given."""
        _checked("cudaStreamSynchronize", cudart.cudaStreamSynchronize(stream))

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Capture what `enqueue` gives the stream as a graph."""
        # thread-local: other workers may allocate meanwhile
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked("cudaStreamBeginCapture", cudart.cudaStreamBeginCapture(stream, mode))
        try:
            enqueue()
        except BaseException:
            _, abandoned = cudart.cudaStreamEndCapture(stream)
            if abandoned is not None and int(abandoned):
                cudart.cudaGraphDestroy(abandoned)
            raise
        graph = _checked("cudaStreamEndCapture", cudart.cudaStreamEndCapture(stream))
        try:
            return _checked("cudaGraphInstantiate", cudart.cudaGraphInstantiate(graph, 0))
        finally:
            _checked("cudaGraphDestroy", cudart.cudaGraphDestroy(graph))

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a captured graph."""
        _checked("cudaGraphLaunch", cudart.cudaGraphLaunch(graph, stream))

    def destroy_graph(self, graph: Any) -> None:
        """Give it back."""
        _checked("cudaGraphExecDestroy", cudart.cudaGraphExecDestroy(graph))
