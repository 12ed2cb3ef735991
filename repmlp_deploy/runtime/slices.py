"""Large batches on a CPU: a slice at a time, because what lies between the operations then stays in the caches.

A GPU needs large batches to be busy. A CPU is busy with eight images, and a batch of 64 only makes every value between
two operations a trip to memory; OpenVINO's batched products in bfloat16 and int8 also lose an order of magnitude of
their speed with that many rows. B224's batch of 64, eight images at a time, against all at once: ONNX Runtime 0.90 of
the time in float32 and 0.79 in int8, OpenVINO 0.93, 0.73 in bf16 and 0.94 in int8.

Where several inferences run at a time, on fewer cores each, a batch is cut for all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import BatchRange

__all__ = ["Streams", "run_by_slices", "slice_sizes", "slices_of"]

Arrays = Sequence[NDArray[Any]]


def slice_sizes(samples: int, batch: BatchRange) -> tuple[int, ...]:
    """Return how many samples to run at once: the best size as often as it fits, then the rest.

    Where the rest would be less than the smallest size that is served, it is run with the slice before it; where the
    two are more than the largest, everything is run at once.
    """
    whole, rest = divmod(samples, batch.opt)
    if not whole:
        return (samples,)
    sizes = [batch.opt] * whole
    if rest >= batch.min:
        sizes.append(rest)
    elif rest:
        sizes[-1] += rest
    return tuple(sizes) if max(sizes) <= batch.max else (samples,)


def run_by_slices(run: Callable[..., Arrays], inputs: Arrays, batch: BatchRange) -> list[NDArray[Any]]:
    """Run every input, samples first, and return every output; large batches run by slices."""
    answers = [run(*part) for part in slices_of(inputs, batch)]
    if len(answers) == 1:
        return list(answers[0])
    return [np.concatenate(outputs) for outputs in zip(*answers, strict=True)]


def slices_of(inputs: Arrays, batch: BatchRange) -> Iterator[list[NDArray[Any]]]:
    """Yield the parts of every input that run at once."""
    start = 0
    for size in slice_sizes(len(inputs[0]), batch):
        yield [value[start : start + size] for value in inputs]
        start += size


class Streams:
    """Cuts batches into slices, and runs several of them at a time. One instance serves any number of threads.

    Args:
        batch: sizes to serve.
        count: slices that run at a time; 1 runs them in the caller's thread.
    """

    def __init__(self, batch: BatchRange, count: int) -> None:
        self._batch, self.count = batch, count
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def run(self, run: Callable[..., Arrays], inputs: Arrays) -> list[NDArray[Any]]:
        """Run every input, samples first, and return every output; `run` is called from several threads."""
        if self.count == 1:
            return run_by_slices(run, inputs, self._batch)
        share = -(-len(inputs[0]) // self.count)
        best = min(self._batch.opt, max(self._batch.min, share))
        parts = list(slices_of(inputs, self._batch.model_copy(update={"opt": best})))
        if len(parts) == 1:
            return list(run(*parts[0]))
        answers = list(self._threads().map(lambda part: run(*part), parts))
        return [np.concatenate(outputs) for outputs in zip(*answers, strict=True)]

    def close(self) -> None:
        """Wait for the threads."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="stream")
            return self._pool
