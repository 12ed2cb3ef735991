"""One worker of an engine: an execution context, a stream, pinned and device buffers, and its CUDA graphs.

An execution context serves one thread at a time, so a worker does too; the pool in `runner` sees to that.
Buffers are as large as the largest batch needs and live as long as the worker, so that their addresses can be captured.

CUDA graphs. TensorRT-RTX captures by itself, once its kernels for a shape are compiled, and is told so when its context
is made. For TensorRT the worker captures: one graph a batch bucket, copies included, each from an execution context
of its own, because a graph bakes its context's state in. These contexts run one at a time and share one scratch memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.errors import DeviceError
from repmlp_deploy.runtime.tensorrt.device_arrays import DeviceArray
from repmlp_deploy.runtime.tensorrt.device_memory import Bytes, DeviceMemory
from repmlp_deploy.runtime.tensorrt.engine import LoadedEngine, Tensor

__all__ = ["Contexts", "Input", "Worker", "batch_buckets"]

Input = NDArray[Any] | DeviceArray

_ALIGNMENT = 256  # bytes; what cudaMalloc gives, and TensorRT's kernels may rely on


def batch_buckets(smallest: int, largest: int, best: Sequence[int]) -> frozenset[int]:
    """Return the batch sizes that get a graph: the ends, the profiles' best, and the powers of two between."""
    powers = {1 << i for i in range(largest.bit_length())}
    return frozenset(n for n in {smallest, largest, *best, *powers} if smallest <= n <= largest)


@dataclass(frozen=True)
class Contexts:
    """How execution contexts are made.

    Attributes:
        loaded: the engine.
        runtime_config: TensorRT-RTX's, or None.
        buckets: batch sizes that the worker captures graphs for; none where TensorRT-RTX does or nobody.
    """

    loaded: LoadedEngine
    runtime_config: Any = None
    buckets: frozenset[int] = frozenset()

    def scratch_bytes(self) -> int:
        """Return the length of the scratch memory that a worker's contexts share; 0 if the only one brings its own."""
        return max(1, int(self.loaded.engine.device_memory_size_v2)) if self.buckets else 0

    def create(self, scratch: int | None) -> Any:
        """Create an execution context.

        Args:
            scratch: address of the shared scratch memory, or None.

        Raises:
            DeviceError: TensorRT makes none.
        """
        engine, trt = self.loaded.engine, self.loaded.trt
        if self.runtime_config is not None:
            context = engine.create_execution_context(self.runtime_config)
        elif scratch is not None:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise DeviceError(f"TensorRT makes no execution context: {self.loaded.last_error()}")
        if scratch is not None:
            context.set_device_memory(scratch, self.scratch_bytes())
        return context


class _Bound:
    """An execution context, and what it has been told."""

    def __init__(self, context: Any, loaded: LoadedEngine) -> None:
        self._context = context
        self._loaded = loaded
        self._profile = 0
        self._batch: int | None = None
        self._addresses: dict[str, int] = {}

    def prepare(self, batch: int, addresses: dict[str, int], stream: int) -> None:
        """Select the profile, the shapes and the addresses, as far as they are not selected.

        Raises:
            DeviceError: TensorRT refuses one of them.
        """
        profile = self._loaded.find_profile(batch)
        if profile != self._profile:
            self._require(self._context.set_optimization_profile_async(profile, stream), f"profile {profile}")
            self._profile, self._batch = profile or 0, None
        if batch != self._batch:
            for tensor in self._loaded.inputs:
                shape = (batch, *tensor.shape[1:])
                self._require(self._context.set_input_shape(tensor.name, shape), f"shape {shape} of {tensor.name}")
            self._batch = batch
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._require(self._context.set_tensor_address(name, address), f"address of {name}")
                self._addresses[name] = address

    def execute(self, stream: int) -> None:
        """Enqueue an inference.

        Raises:
            DeviceError: TensorRT refuses.
        """
        self._require(self._context.execute_async_v3(stream), "inference")

    def output_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape of an output for the selected shapes."""
        return tuple(self._context.get_tensor_shape(tensor.name))

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise DeviceError(f"TensorRT refuses the {what}: {self._loaded.last_error()}")


@dataclass(frozen=True)
class _Captured:
    """The graph of one batch size, and the context it came from."""

    graph: Any
    bound: _Bound


class Worker:
    """Runs one inference at a time.

    Args:
        contexts: how execution contexts are made.
        memory: the device.

    Attributes:
        refusal: why graphs are no longer captured; None while they are.

    Raises:
        DeviceError: memory, stream or context cannot be had; what was had is given back.
    """

    def __init__(self, contexts: Contexts, memory: DeviceMemory) -> None:
        self._contexts = contexts
        self._loaded = contexts.loaded
        self._memory = memory
        self._captured: dict[int, _Captured] = {}
        self.refusal: str | None = None
        with memory.active(), ExitStack() as held:
            self._stream = memory.create_stream()
            held.callback(memory.destroy_stream, self._stream)
            self._device: dict[str, int] = {}
            self._host: dict[str, Bytes] = {}
            for tensor in (*self._loaded.inputs, *self._loaded.outputs):
                self._device[tensor.name] = self._allocate(tensor.nbytes, held)
                self._host[tensor.name] = memory.allocate_pinned(tensor.nbytes)
                held.callback(self._free_pinned, tensor.name)
            size = contexts.scratch_bytes()
            self._scratch = self._allocate(size, held) if size else None
            # contexts die after their graphs and before the memory they were told of
            held.callback(self._drop_contexts)
            self._bound: _Bound | None = _Bound(contexts.create(self._scratch), self._loaded)
            self._held = held.pop_all()

    def run(self, inputs: Sequence[Input], batch: int) -> list[NDArray[Any]]:
        """Run and return every output, in the manifest's order, as arrays the caller owns.

        Args:
            inputs: in the manifest's order, of the engine's shapes and types; host arrays are C-contiguous.
            batch: their first dimension, which a profile serves.

        Raises:
            DeviceError: a call failed; the worker is of no more use.
        """
        with self._memory.active():
            self._stage(inputs)
            if all(isinstance(value, np.ndarray) for value in inputs) and batch in self._contexts.buckets:
                bound = self._run_captured(inputs, batch)
            else:
                bound = self._run_plainly(inputs, batch)
            self._memory.synchronize(self._stream)
        return [self._view(tensor, bound.output_shape(tensor)).copy() for tensor in self._loaded.outputs]

    def close(self) -> None:
        """Wait for the stream and give everything back."""
        with self._memory.active():
            try:
                self._memory.synchronize(self._stream)
            finally:
                self._held.close()

    def _stage(self, inputs: Sequence[Input]) -> None:
        """Copy host inputs into pinned memory; leave device inputs where they are."""
        for tensor, value in zip(self._loaded.inputs, inputs, strict=True):
            if isinstance(value, np.ndarray):
                np.copyto(self._view(tensor, value.shape), value)
            elif value.producer is not None:
                self._memory.wait_for(self._stream, value.producer)

    def _run_plainly(self, inputs: Sequence[Input], batch: int) -> _Bound:
        bound = self._bound
        assert bound is not None, "the worker was closed"  # noqa: S101 - the pool hands out none that is
        addresses = dict(self._device)
        for tensor, value in zip(self._loaded.inputs, inputs, strict=True):
            addresses[tensor.name] = self._enqueue_input(tensor, value)
        bound.prepare(batch, addresses, self._stream)
        bound.execute(self._stream)
        self._enqueue_outputs(bound)
        return bound

    def _run_captured(self, inputs: Sequence[Input], batch: int) -> _Bound:
        captured = self._captured.get(batch)
        if captured is not None:
            self._memory.launch(captured.graph, self._stream)
            return captured.bound
        return self._run_plainly(inputs, batch) if self.refusal is not None else self._run_and_capture(inputs, batch)

    def _run_and_capture(self, inputs: Sequence[Input], batch: int) -> _Bound:
        """Run for real, because what TensorRT defers to the first inference must not be captured; then capture."""
        bound = _Bound(self._contexts.create(self._scratch), self._loaded)
        bound.prepare(batch, self._device, self._stream)

        def enqueue() -> None:
            for tensor, value in zip(self._loaded.inputs, inputs, strict=True):
                self._enqueue_input(tensor, value)
            bound.execute(self._stream)
            self._enqueue_outputs(bound)

        enqueue()
        self._memory.synchronize(self._stream)
        try:
            graph = self._memory.capture(self._stream, enqueue)
        except DeviceError as error:
            self.refusal = str(error)
        else:
            self._held.callback(self._memory.destroy_graph, graph)
            self._captured[batch] = _Captured(graph, bound)
        return bound

    def _enqueue_input(self, tensor: Tensor, value: Input) -> int:
        """Return the device address of an input; enqueue a copy if one is needed."""
        if isinstance(value, np.ndarray):
            self._memory.copy_in(self._device[tensor.name], self._host[tensor.name][: value.nbytes], self._stream)
        elif value.address % _ALIGNMENT:
            self._memory.copy_within(self._device[tensor.name], value.address, value.nbytes, self._stream)
        else:
            return value.address
        return self._device[tensor.name]

    def _enqueue_outputs(self, bound: _Bound) -> None:
        for tensor in self._loaded.outputs:
            target = self._view(tensor, bound.output_shape(tensor)).reshape(-1).view(np.uint8)
            self._memory.copy_out(target, self._device[tensor.name], self._stream)

    def _view(self, tensor: Tensor, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the beginning of a tensor's pinned memory as an array."""
        size = int(np.prod(shape, dtype=np.int64)) * tensor.dtype.itemsize
        return self._host[tensor.name][:size].view(tensor.dtype).reshape(shape)

    def _allocate(self, size: int, held: ExitStack) -> int:
        address = self._memory.allocate(size)
        held.callback(self._memory.free, address)
        return address

    def _drop_contexts(self) -> None:
        self._captured.clear()
        self._bound = None

    def _free_pinned(self, name: str) -> None:
        self._memory.free_pinned(self._host.pop(name))
