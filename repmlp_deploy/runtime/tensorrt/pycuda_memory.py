"""Device memory through PyCUDA, for services that hold its context: it is joined, none is created.

PyCUDA binds a context to the thread that pushed it. The one that is current when the back end opens is pushed in every
thread for the duration of its work and popped again, so that whatever the service has current there is so afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Never

import numpy as np

from repmlp_deploy.errors import DeviceError, InputError, MissingDependency, MissingDevice
from repmlp_deploy.runtime.tensorrt.device_memory import Bytes

try:
    import pycuda.driver as cuda
except ImportError:
    raise MissingDependency("pycuda", "pycuda") from None

__all__ = ["PyCudaMemory"]

_NO_GRAPHS = "PyCUDA captures no CUDA graphs: use the cuda-python back end for them"


class PyCudaMemory:
    """The device of the PyCUDA context that is current in the calling thread.

    Args:
        device: the one that the context must be on; None for whichever it is on.

    Raises:
        MissingDevice: no context is current, or it is on another device.
    """

    name = "pycuda"
    captures = False

    def __init__(self, device: int | None = None) -> None:
        self._context = self._current_context()
        found = cuda.Context.get_device()
        if device is not None and found != cuda.Device(device):
            raise MissingDevice(
                f"the current PyCUDA context is not on device {device}: push the context of that device first"
            )
        major, minor = found.compute_capability()
        self.capability = f"{major}.{minor}"
        self._allocations: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}

    @staticmethod
    def _current_context() -> Any:
        try:
            cuda.init()
        except cuda.Error as error:
            raise MissingDevice(
                f"PyCUDA finds no usable NVIDIA driver, {error}: install or update the driver, "
                "or run the bundle's onnx artifact on the CPU"
            ) from None
        context = cuda.Context.get_current()
        if context is None:
            raise MissingDevice(
                "no PyCUDA context is current in this thread: open the runner where the service's context is pushed, "
                "or use the cuda-python back end, which needs none"
            )
        return context

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the service's context current in this thread for the duration."""
        try:
            self._context.push()
            try:
                yield
            finally:
                cuda.Context.pop()
        except cuda.Error as error:
            raise DeviceError(f"PyCUDA: {error}") from None

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes on the device and return their address."""
        allocation = cuda.mem_alloc(size)
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def free(self, address: int) -> None:
        """Free the bytes at this address."""
        self._allocations.pop(address).free()

    def allocate_pinned(self, size: int) -> Bytes:
        """Allocate `size` bytes of page-locked host memory."""
        array: Bytes = cuda.pagelocked_empty(size, np.uint8)
        return array

    def free_pinned(self, array: Bytes) -> None:
        """Free the bytes at this address."""
        array.base.free()  # type: ignore[union-attr]

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        stream = cuda.Stream(1)  # CU_STREAM_NON_BLOCKING, which PyCUDA gives no name
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        """Give it back: PyCUDA destroys a stream with its last reference."""
        del self._streams[stream]

    def copy_in(self, address: int, source: Bytes, stream: int) -> None:
        """Enqueue a copy of pinned host memory to the device."""
        cuda.memcpy_htod_async(address, source, self._streams[stream])

    def copy_out(self, target: Bytes, address: int, stream: int) -> None:
        """Enqueue a copy from the device to pinned host memory."""
        cuda.memcpy_dtoh_async(target, address, self._streams[stream])

    def copy_within(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy of `size` bytes on the device."""
        cuda.memcpy_dtod_async(target, source, size, self._streams[stream])

    def wait_for(self, stream: int, producer: int) -> None:  # noqa: ARG002 - see below
        """Wait for everything in the context: PyCUDA cannot record an event on a stream that it did not make."""
        cuda.Context.synchronize()

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done all it was given."""
        self._streams[stream].synchronize()

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Never:  # noqa: ARG002 - the protocol's
        """Refuse: PyCUDA has no CUDA graphs."""
        raise InputError(_NO_GRAPHS)

    def launch(self, graph: Any, stream: int) -> Never:  # noqa: ARG002 - the protocol's
        """Refuse: PyCUDA has no CUDA graphs."""
        raise InputError(_NO_GRAPHS)

    def destroy_graph(self, graph: Any) -> Never:  # noqa: ARG002 - the protocol's
        """Refuse: PyCUDA has no CUDA graphs."""
        raise InputError(_NO_GRAPHS)
