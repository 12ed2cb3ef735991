"""`pycuda.driver` on the simulated GPU: contexts are current in the thread that pushed them, and nowhere else."""

from __future__ import annotations

import threading
import types
from contextlib import suppress
from typing import Any

import numpy as np

from support.fakes.gpu import Gpu, Misuse


class Error(Exception):
    """The root of PyCUDA's errors."""


class _Driver:
    """What the classes below share: the GPU, and the stack of contexts of every thread."""

    gpu: Gpu
    stacks = threading.local()

    @classmethod
    def stack(cls) -> list[Any]:
        if not hasattr(cls.stacks, "contexts"):
            cls.stacks.contexts = []
        return cls.stacks.contexts

    @classmethod
    def current(cls) -> Gpu:
        if not cls.stack():
            raise cls.gpu.misuse("a PyCUDA call in a thread where no context is current")
        return cls.gpu


def make_driver(gpu: Gpu) -> types.ModuleType:  # noqa: C901 - one class after the other
    """The module."""

    class Driver(_Driver):
        stacks = threading.local()

    Driver.gpu = gpu

    class Device:
        def __init__(self, ordinal):
            self.ordinal = ordinal

        def __eq__(self, other):
            return self.ordinal == other.ordinal

        def __hash__(self):
            return self.ordinal

        def compute_capability(self):
            return gpu.capability

        def make_context(self):
            context = Context()
            context.push()
            return context

    class Context:
        def push(self):
            Driver.stack().append(self)

        @staticmethod
        def pop():
            if not Driver.stack():
                raise gpu.misuse("pop of a context in a thread where none is current")
            Driver.stack().pop()

        @staticmethod
        def get_current():
            return Driver.stack()[-1] if Driver.stack() else None

        @staticmethod
        def get_device():
            Driver.current()
            return Device(0)

        @staticmethod
        def synchronize():
            Driver.current().synchronize_all()

    class DeviceAllocation:
        def __init__(self, address):
            self._address = address

        def __int__(self):
            return self._address

        def free(self):
            Driver.current().free(self._address)

    class PagelockedHostAllocation:
        def __init__(self, array):
            self._array = array
            self.__array_interface__ = array.__array_interface__

        def free(self):
            Driver.current().free_pinned(self._array.ctypes.data)

    class Stream:
        def __init__(self, flags=0):
            self.handle = Driver.current().create_stream()

        def synchronize(self):
            Driver.current().synchronize(self.handle)

        def __del__(self):
            with suppress(Misuse):  # nobody could catch it here; the GPU keeps it
                gpu.destroy_stream(self.handle)

    def init(flags=0):
        if not gpu.devices:
            raise Error("cuInit failed: no CUDA-capable device is detected")

    def mem_alloc(bytes):  # noqa: A002 - its real name
        if "mem_alloc" in gpu.failing:
            raise Error("cuMemAlloc failed: out of memory")
        return DeviceAllocation(Driver.current().allocate(bytes))

    def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
        assert np.dtype(dtype) == np.uint8
        return np.asarray(PagelockedHostAllocation(Driver.current().allocate_pinned(shape)))

    def memcpy_htod_async(dest, src, stream=None):
        Driver.current().copy_in(int(dest), src.ctypes.data, src.nbytes, stream.handle)

    def memcpy_dtoh_async(dest, src, stream=None):
        Driver.current().copy_out(dest.ctypes.data, int(src), dest.nbytes, stream.handle)

    def memcpy_dtod_async(dest, src, size, stream=None):
        Driver.current().copy_within(int(dest), int(src), size, stream.handle)

    module = types.ModuleType("pycuda.driver")
    for value in (Error, Device, Context, DeviceAllocation, PagelockedHostAllocation, Stream):
        setattr(module, value.__name__, value)
    for value in (init, mem_alloc, pagelocked_empty, memcpy_htod_async, memcpy_dtoh_async, memcpy_dtod_async):
        setattr(module, value.__name__, value)
    return module
