"""Device memory through one small protocol, and the table of the packages that offer it.

An address is an integer, a stream its CUDA handle as an integer: what engines take. A back end counts nothing and
pools nothing; who allocates also frees. Calls that concern the device are made inside `active()`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.errors import InputError

__all__ = ["DEVICE_MEMORY", "Bytes", "DeviceMemory", "open_memory"]

Bytes = NDArray[np.uint8]


class DeviceMemory(Protocol):
    """One CUDA device through one package; safe to share between threads. A call that fails raises `DeviceError`.

    Attributes:
        name: its entry in `DEVICE_MEMORY`.
        captures: whether it can capture CUDA graphs.
        capability: compute capability of the device, such as `8.6`.
    """

    name: str
    captures: bool
    capability: str

    def active(self) -> AbstractContextManager[None]:
        """Make the device's context current in this thread for the duration."""
        ...

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes on the device and return their address."""
        ...

    def free(self, address: int) -> None:
        """Free the bytes at this address."""
        ...

    def allocate_pinned(self, size: int) -> Bytes:
        """Allocate `size` bytes of page-locked host memory, which the device copies from and to on its own."""
        ...

    def free_pinned(self, array: Bytes) -> None:
        """Give them back; every view of the array is dead."""
        ...

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Give it back; its work is done."""
        ...

    def copy_in(self, address: int, source: Bytes, stream: int) -> None:
        """Enqueue a copy of pinned host memory to the device."""
        ...

    def copy_out(self, target: Bytes, address: int, stream: int) -> None:
        """Enqueue a copy from the device to pinned host memory."""
        ...

    def copy_within(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy of `size` bytes on the device."""
        ...

    def wait_for(self, stream: int, producer: int) -> None:
        """Let what `stream` is given next begin after what the stream `producer` has been given so far."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done all it was given."""
        ...

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Any:
        """Capture what `enqueue` gives the stream as a graph, instead of running it."""
        ...

    def launch(self, graph: Any, stream: int) -> None:
        """Enqueue a captured graph."""
        ...

    def destroy_graph(self, graph: Any) -> None:
        """Give it back; its work is done."""
        ...


DEVICE_MEMORY = {
    "cuda-python": "repmlp_deploy.runtime.tensorrt.cuda_python_memory:CudaPythonMemory",
    "pycuda": "repmlp_deploy.runtime.tensorrt.pycuda_memory:PyCudaMemory",
}
"""Name to the class of the back end, the default first."""


def open_memory(name: str, device: int | None = None) -> DeviceMemory:
    """Open a back end on one device.

    Args:
        name: an entry of `DEVICE_MEMORY`.
        device: its index, in CUDA's order; None for the first, or the one whose context is joined.

    Raises:
        InputError: there is no such back end.
        MissingDependency: its package is not installed.
        MissingDevice: there is no driver, or no such device.
    """
    if name not in DEVICE_MEMORY:
        raise InputError(f"device memory is {name!r}; expected one of {', '.join(DEVICE_MEMORY)}")
    module, cls = DEVICE_MEMORY[name].split(":")
    build: Callable[[int | None], DeviceMemory] = getattr(import_module(module), cls)
    return build(device)
