"""Arrays that already lie on the device, of any library that has `__cuda_array_interface__`: torch, CuPy, PyCUDA.

The interface's version 3 names the stream on which the content is being made. Versions before it, torch's among them,
do not: there the default stream is waited for, and a producer on another stream must be synchronised by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from repmlp_deploy.errors import InputError

__all__ = ["DeviceArray", "as_device_array"]

LEGACY_DEFAULT_STREAM = 1
_NAMES_STREAMS = 3


@dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array on the device.

    Attributes:
        address: of its first byte.
        shape: of the array.
        dtype: of its elements.
        producer: the stream to wait for, as CUDA's handle; None for none.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    producer: int | None

    @property
    def nbytes(self) -> int:
        """Its length."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def as_device_array(value: Any) -> DeviceArray | None:
    """Return the array interface of `value`; None if it has none.

    Raises:
        InputError: the interface is one that an engine cannot read.
    """
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        return None
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    if interface.get("mask") is not None:
        raise InputError("the device array is masked; an engine takes plain arrays")
    strides = interface.get("strides")
    if strides is not None and not _contiguous(shape, tuple(strides), dtype.itemsize):
        raise InputError(
            f"the device array of shape {shape} has strides {tuple(strides)}; an engine takes C-contiguous ones: "
            "copy it first, such as by .contiguous() or ascontiguousarray"
        )
    return DeviceArray(int(interface["data"][0]), shape, dtype, _producer(interface))


def _producer(interface: dict[str, Any]) -> int | None:
    if interface.get("version", 0) < _NAMES_STREAMS:
        return LEGACY_DEFAULT_STREAM
    stream = interface.get("stream")
    if stream == 0:
        raise InputError("the device array names stream 0, which its interface forbids: 1 is the default stream")
    return None if stream is None else int(stream)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    expected = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True
