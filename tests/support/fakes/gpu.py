"""A simulated GPU that forgives nothing.

What a stream is given is not done before somebody waits for it: whoever reads too early reads 0xFF, which is NaN as a
float. Every use that CUDA calls undefined raises `Misuse`, and is kept in `misuses` in case somebody swallows it.
"""

from __future__ import annotations

import gc
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LEGACY_DEFAULT_STREAM = 1
POISON = 0xFF


class Misuse(AssertionError):
    """Something that a real GPU would answer with wrong numbers, a crash, or nothing at all."""


@dataclass
class Block:
    """Allocated memory of the device or of the host."""

    address: int
    content: np.ndarray
    pending: int = 0

    def end(self) -> int:
        return self.address + len(self.content)


@dataclass
class Operation:
    """What a stream is given.

    Attributes:
        name: for messages.
        run: does it.
        reads: blocks that it reads.
        writes: blocks that it writes.
        begin: what happens when it is given, such as the poisoning of its target.
        check: whether what it was given still holds; run before anything else is given to the stream.
    """

    name: str
    run: Callable[[], None]
    reads: list[Block] = field(default_factory=list)
    writes: list[Block] = field(default_factory=list)
    begin: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None


@dataclass
class Stream:
    """Operations in order; `done` of the `given` ones have run."""

    handle: int
    pending: list[Operation] = field(default_factory=list)
    given: int = 0
    done: int = 0
    ordered_after: dict[int, int] = field(default_factory=dict)
    capture: list[Operation] | None = None
    capture_thread: int = 0
    capture_mode: str = "global"


class Gpu:
    """The device.

    Attributes:
        devices: how many of its kind the machine has; 0 for no driver.
        capability: compute capability.
        refuses_capture: whether engines cannot be captured.
        failing: name of a runtime call to the error it is to return.
        calls: what third-party code was asked to do, in order.
        misuses: every misuse so far.
    """

    def __init__(self, *, devices: int = 1, capability: tuple[int, int] = (8, 6)) -> None:
        self.devices = devices
        self.capability = capability
        self.refuses_capture = False
        self.failing: dict[str, int] = {}
        self.calls: list[str] = []
        self.misuses: list[str] = []
        self.lock = threading.RLock()
        self.objects: weakref.WeakSet[Any] = weakref.WeakSet()
        self._blocks: dict[int, Block] = {}
        self._pinned: dict[int, Block] = {}
        self._graveyard: list[Block] = []
        self._streams = {LEGACY_DEFAULT_STREAM: Stream(LEGACY_DEFAULT_STREAM)}
        self._events: dict[int, tuple[int, int]] = {}
        self._graphs: dict[int, list[Operation]] = {}
        self._next = 0x10_0000
        self.on_execute: Callable[[], None] = lambda: None

    # Checks

    def misuse(self, message: str) -> Misuse:
        self.misuses.append(message)
        return Misuse(message)

    def assert_clean(self) -> None:
        """Raise if anything was misused or not given back."""
        if self.misuses:
            raise Misuse(f"misuse that was swallowed: {self.misuses}")
        if self.objects:  # collecting takes a second where torch is loaded
            gc.collect()
        left = {
            "device memory": [hex(address) for address in self._blocks],
            "pinned memory": [hex(address) for address in self._pinned],
            "streams": [stream for stream in self._streams if stream != LEGACY_DEFAULT_STREAM],
            "events": list(self._events),
            "graphs": list(self._graphs),
            "engine objects": sorted(type(value).__name__ for value in self.objects),
        }
        leaks = {what: values for what, values in left.items() if values}
        if leaks:
            raise self.misuse(f"leak: {leaks}")

    # Memory

    def allocate(self, size: int) -> int:
        with self.lock:
            self._forbid_while_capturing("allocation of device memory")
            block = Block(self._take(size), np.full(size, POISON, np.uint8))
            self._blocks[block.address] = block
            return block.address

    def free(self, address: int) -> None:
        with self.lock:
            block = self._blocks.pop(address, None)
            if block is None:
                raise self.misuse(f"double free, or free of a foreign address {address:#x}")
            if block.pending:
                raise self.misuse(f"free of device memory {address:#x} that pending work uses")

    def allocate_pinned(self, size: int) -> np.ndarray:
        with self.lock:
            self._forbid_while_capturing("allocation of pinned memory")
            array = np.full(size, POISON, np.uint8)
            self._pinned[array.ctypes.data] = Block(array.ctypes.data, array)
            return array

    def free_pinned(self, address: int) -> None:
        with self.lock:
            block = self._pinned.pop(address, None)
            if block is None:
                raise self.misuse(f"double free of pinned memory {address:#x}")
            block.content[:] = POISON
            self._graveyard.append(block)  # views of it stay readable, and poisoned
            if block.pending:
                raise self.misuse(f"free of pinned memory {address:#x} that pending work uses")

    def find(self, address: int, size: int) -> tuple[Block, np.ndarray]:
        """The device memory at an address."""
        with self.lock:
            block = _containing(self._blocks, address)
            if block is None or address + size > block.end():
                raise self.misuse(f"{size} bytes at {address:#x} are no live device memory: freed, or too short")
            start = address - block.address
            return block, block.content[start : start + size]

    def find_pinned(self, address: int, size: int) -> tuple[Block, np.ndarray]:
        """The pinned host memory at an address."""
        with self.lock:
            block = _containing(self._pinned, address)
            if block is None or address + size > block.end():
                raise self.misuse(f"{size} bytes at {address:#x} are no live pinned memory: freed, or pageable")
            start = address - block.address
            return block, block.content[start : start + size]

    # Streams and events

    def create_stream(self) -> int:
        with self.lock:
            handle = self._take(1)
            self._streams[handle] = Stream(handle)
            return handle

    def destroy_stream(self, handle: int) -> None:
        with self.lock:
            stream = self._stream(handle)
            if stream.pending:
                raise self.misuse(f"stream destroyed with {len(stream.pending)} operations pending")
            del self._streams[handle]

    def enqueue(self, handle: int, operation: Operation) -> None:
        with self.lock:
            stream = self._stream(handle)
            if stream.capture is not None:
                if stream.capture_thread != threading.get_ident():
                    raise self.misuse("another thread gives work to a stream that captures")
                stream.capture.append(operation)
                return
            self._give(stream, operation)

    def synchronize(self, handle: int) -> None:
        with self.lock:
            stream = self._stream(handle)
            if stream.capture is not None:
                raise self.misuse("synchronisation of a stream that captures")
            self._run_until(stream, stream.given)

    def synchronize_all(self) -> None:
        with self.lock:
            for handle in list(self._streams):
                self.synchronize(handle)

    def create_event(self) -> int:
        with self.lock:
            handle = self._take(1)
            self._events[handle] = (0, 0)
            return handle

    def record_event(self, event: int, handle: int) -> None:
        with self.lock:
            self._events[self._event(event)] = (handle, self._stream(handle).given)

    def wait_event(self, handle: int, event: int) -> None:
        with self.lock:
            producer, position = self._events[self._event(event)]
            stream, source = self._stream(handle), self._stream(producer)
            stream.ordered_after[producer] = position
            self.enqueue(handle, Operation("wait", lambda: self._run_until(source, position)))

    def destroy_event(self, event: int) -> None:
        with self.lock:
            del self._events[self._event(event)]

    # Graphs

    def begin_capture(self, handle: int, mode: str) -> None:
        with self.lock:
            stream = self._stream(handle)
            if stream.capture is not None or handle == LEGACY_DEFAULT_STREAM:
                raise self.misuse("capture of a stream that captures already, or of the default stream")
            stream.capture, stream.capture_thread, stream.capture_mode = [], threading.get_ident(), mode

    def end_capture(self, handle: int) -> int:
        with self.lock:
            stream = self._stream(handle)
            if stream.capture is None:
                raise self.misuse("end of a capture that never began")
            graph, stream.capture = stream.capture, None
            return self.keep_graph(graph)

    def keep_graph(self, operations: list[Operation]) -> int:
        handle = self._take(1)
        self._graphs[handle] = list(operations)
        return handle

    def instantiate(self, graph: int) -> int:
        with self.lock:
            return self.keep_graph(self._graph(graph))

    def launch(self, graph: int, handle: int) -> None:
        with self.lock:
            for operation in self._graph(graph):
                self.enqueue(handle, operation)

    def destroy_graph(self, graph: int) -> None:
        with self.lock:
            self._graph(graph)
            del self._graphs[graph]

    def is_capturing(self, handle: int) -> bool:
        return self._stream(handle).capture is not None

    # Copies

    def copy_in(self, address: int, source: int, size: int, stream: int) -> None:
        device, target = self.find(address, size)
        host, data = self.find_pinned(source, size)
        given: list[bytes] = []

        def begin() -> None:
            given[:] = [data.tobytes()]

        def check() -> None:
            if data.tobytes() != given[0]:
                raise self.misuse("pinned memory was written to before its copy to the device had run")

        def run() -> None:
            check()
            self.require_live(device, host)
            target[:] = data

        self.enqueue(stream, Operation("copy in", run, [host], [device], begin, check))

    def copy_out(self, target: int, address: int, size: int, stream: int) -> None:
        device, source = self.find(address, size)
        host, data = self.find_pinned(target, size)

        def begin() -> None:
            data[:] = POISON

        def run() -> None:
            self.require_live(device, host)
            data[:] = source

        self.enqueue(stream, Operation("copy out", run, [device], [host], begin))

    def copy_within(self, target: int, address: int, size: int, stream: int) -> None:
        read, source = self.find(address, size)
        written, data = self.find(target, size)

        def run() -> None:
            self.require_live(read, written)
            data[:] = source

        self.enqueue(stream, Operation("copy within", run, [read], [written]))

    def require_live(self, *blocks: Block) -> None:
        """Raise unless blocks that were found earlier are still allocated."""
        for block in blocks:
            if self._blocks.get(block.address) is not block and self._pinned.get(block.address) is not block:
                raise self.misuse(f"memory at {block.address:#x} was freed before the work that uses it had run")

    # Inside

    def _give(self, stream: Stream, operation: Operation) -> None:
        for earlier in stream.pending:
            earlier.check()
        self.require_live(*operation.reads, *operation.writes)
        self._forbid_hazards(stream, operation)
        operation.begin()
        for block in (*operation.reads, *operation.writes):
            block.pending += 1
        stream.pending.append(operation)
        stream.given += 1

    def _forbid_hazards(self, stream: Stream, operation: Operation) -> None:
        for other in self._streams.values():
            first = other.given - len(other.pending)
            for i, earlier in enumerate(other.pending):
                if other is stream or first + i < stream.ordered_after.get(other.handle, 0):
                    continue
                if _overlap(earlier.writes, operation.reads + operation.writes) or _overlap(
                    earlier.reads, operation.writes
                ):
                    raise self.misuse(
                        f"wrong stream: {operation.name} on stream {stream.handle:#x} races with {earlier.name} "
                        f"on stream {other.handle:#x}"
                    )

    def _run_until(self, stream: Stream, position: int) -> None:
        while stream.done < position:
            operation = stream.pending[0]
            operation.run()
            stream.pending.pop(0)
            stream.done += 1
            for block in (*operation.reads, *operation.writes):
                block.pending -= 1

    def _forbid_while_capturing(self, what: str) -> None:
        for stream in self._streams.values():
            mine = stream.capture_thread == threading.get_ident()
            if stream.capture is not None and (mine or stream.capture_mode == "global"):
                raise self.misuse(f"{what} while a {stream.capture_mode} capture is going on")

    def _take(self, size: int) -> int:
        with self.lock:
            address = self._next
            self._next += -(-max(size, 1) // 256) * 256 + 256  # a gap, so that overruns meet nothing
            return address

    def _stream(self, handle: int) -> Stream:
        if handle not in self._streams:
            raise self.misuse(f"stream {handle:#x} does not exist: destroyed, or of another device")
        return self._streams[handle]

    def _event(self, event: int) -> int:
        if event not in self._events:
            raise self.misuse(f"event {event:#x} does not exist")
        return event

    def _graph(self, graph: int) -> list[Operation]:
        if graph not in self._graphs:
            raise self.misuse(f"graph {graph:#x} does not exist: destroyed")
        return self._graphs[graph]


def _containing(blocks: dict[int, Block], address: int) -> Block | None:
    starts = sorted(blocks)
    i = bisect_right(starts, address)
    block = blocks[starts[i - 1]] if i else None
    return block if block is not None and address < block.end() else None


def _overlap(a: list[Block], b: list[Block]) -> bool:
    return any(x is y for x in a for y in b)
