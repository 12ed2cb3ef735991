"""One bundle with the runtime that runs one of its artifacts, and the calls that are under way in it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Condition, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Bundle, TensorSpec
from repmlp_deploy.errors import InputError
from repmlp_deploy.numerics import Comparison, margin_of, noise_floor, require_close
from repmlp_deploy.runtime.batching import Batcher, Queueing
from repmlp_deploy.runtime.choice import open_runner
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["Closed", "Served"]


class Closed(Exception):  # noqa: N818 - an outcome that `Predictor` handles
    """The bundle was closed before the call began."""


class Served:
    """A bundle that is open. One instance serves any number of threads of the process that opened it.

    Args:
        bundle: on disk.
        artifact_format: see `open_runner`.
        options: see `open_runner`.
        queueing: how requests wait in `batcher`; 0 workers for as many as inferences run at a time.

    Attributes:
        margin: how often the largest error of the last check fits into what is allowed; None before the first.
        ended: whether memory and devices were given back.
    """

    def __init__(
        self, bundle: Bundle, artifact_format: str | None, options: RunnerOptions, queueing: Queueing | None = None
    ) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.task = find_task(self.manifest.task)
        self.runner = open_runner(bundle, artifact_format, options)
        self.margin: float | None = None
        self._process = os.getpid()
        self._changed = Condition()
        self._running = 0
        self._closed = self._ending = self.ended = False
        how = queueing or Queueing(workers=0)
        self._queueing = how if how.workers else replace(how, workers=self.streams)
        self._batcher: Batcher | None = None

    @property
    def streams(self) -> int:
        """How many inferences run at a time, where the runtime says it."""
        return int(self.runner.details.get("streams", 1))

    def batcher(self) -> Batcher:
        """Return the queue that gathers requests of many callers into batches; made by the first call.

        For use inside `one_call`.
        """
        with self._changed:
            if self._batcher is None:
                self._batcher = Batcher(self.outputs, self.manifest.batch.max, self._queueing)
            return self._batcher

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Count a call, so that closing waits for it.

        Raises:
            Closed: too late.
            InputError: this is a fork of the process that opened the bundle; a runtime's threads are not forked.
        """
        self.require_own_process()
        with self._changed:
            if self._closed:
                raise Closed
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
            if self._is_last():
                self._end_elsewhere()

    @property
    def own_process(self) -> bool:
        """Whether this is the process that opened the bundle, and no fork of it."""
        return os.getpid() == self._process

    def require_own_process(self) -> None:
        """Raise InputError in a fork of the process that opened the bundle."""
        if not self.own_process:
            raise InputError("a Predictor does not survive a fork; open Predictor(folder) in each process instead")

    def close(self) -> None:
        """Refuse further calls, wait for those under way, and give back memory and devices; once.

        A fork does nothing: calls that were under way are the parent's, and so are memory and devices.
        """
        if not self.own_process:
            return
        self.retire()
        with self._changed:
            self._changed.wait_for(lambda: self.ended)

    def retire(self) -> None:
        """Refuse further calls, and wait for none: the last one under way has memory and devices given back."""
        with self._changed:
            self._closed = True
        if self._is_last():
            self._end()

    def _is_last(self) -> bool:
        """Return whether there will be no call any more; True once."""
        with self._changed:
            last = self._closed and not self._running and not self._ending
            self._ending = self._ending or last
        return last

    def _end_elsewhere(self) -> None:
        """Give back memory and devices in a thread: this one may be an event loop's, and batches may be running."""
        try:
            Thread(target=self._end, name="end").start()
        except RuntimeError:  # there are too many threads, or the process ends
            self._end()

    def _end(self) -> None:
        try:
            if self._batcher is not None:
                self._batcher.close()
            self.runner.close()
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    def outputs(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a batch of any size, and return every output, each an array that the caller owns.

        Batches larger than the artifact's maximum are split, smaller ones than its minimum are padded.

        Args:
            inputs: (N, …) each, in the manifest's order.

        Raises:
            InputError: a shape or type is not the network's, or the batch is empty.
        """
        count, limit = self.require_fit(inputs), self.manifest.batch.max
        parts = [self._run([values[i : i + limit] for values in inputs]) for i in range(0, count, limit)]
        return parts[0] if len(parts) == 1 else [np.concatenate(whole) for whole in zip(*parts, strict=True)]

    def check(self) -> list[tuple[int, Comparison]]:
        """Run the probe: (batch size, distance from the trained network), for several sizes and every output.

        Raises:
            VerificationError: an output is further from the trained network's than the artifact's precision allows.
        """
        probe, batch = self.bundle.probe(), self.manifest.batch
        precision = self.bundle.artifact(self.runner.format).precision
        floors = [noise_floor(float32, reference) for reference, float32 in probe.outputs()]
        results, margins = [], []
        for size in sorted({batch.min, batch.opt}):
            inputs, references = probe.batches(size)
            for i, (output, reference) in enumerate(zip(self.outputs(inputs), references, strict=True)):
                name = f", {self.manifest.outputs[i].name}" if len(references) > 1 else ""
                what = f"{self.runner.format} on {self.runner.device} at batch {size}{name}"
                classes = self.task.class_axes == reference.ndim
                result = require_close(what, output, reference, floor=floors[i], precision=precision, classes=classes)
                results.append((size, result))
                margins.append(margin_of(result, floor=floors[i], precision=precision))
        self.margin = min((margin for margin in margins if margin is not None), default=math.inf)
        return results

    def warm_up(self) -> None:
        """Run the smallest and the preferred batch once, on a GPU the largest too, so that memory is there.

        On a CPU the largest batch runs in slices of the preferred size.
        """
        batch = self.manifest.batch
        largest = () if self.runner.device == "cpu" else (batch.max,)
        for size in sorted({batch.min, batch.opt, *largest}):
            self.outputs([_zeros(spec, size) for spec in self.manifest.inputs])

    def require_fit(self, inputs: Sequence[NDArray[Any]]) -> int:
        """Return the number of samples.

        Raises:
            InputError: a shape or type is not the network's, or the batch is empty.
        """
        for spec, values in zip(self.manifest.inputs, inputs, strict=True):
            self._require_shape(spec, values)
        sizes = {len(values) for values in inputs}
        if len(sizes) > 1:
            raise InputError(f"inputs have batches of {', '.join(map(str, sorted(sizes)))}; they must be equal")
        count = sizes.pop()
        if not count:
            raise InputError("input is an empty batch; give at least one sample")
        return count

    def _require_shape(self, spec: TensorSpec, values: object) -> None:
        expected = spec.shape[1:]
        what = "input" if len(self.manifest.inputs) == 1 else f"input {spec.name}"
        if not isinstance(values, np.ndarray) or values.ndim != len(expected) + 1 or values.shape[1:] != expected:
            got = tuple(values.shape) if isinstance(values, np.ndarray) else type(values).__name__
            takes = ", ".join(("N", *(str(edge) for edge in expected)))
            kind = "" if isinstance(values, np.ndarray) else "a NumPy array "
            raise InputError(f"{what} is {got}; {self.manifest.name} takes {kind}({takes})")
        if values.dtype.name != spec.dtype:
            raise InputError(f"{what} is {values.dtype}; {self.manifest.name} takes {spec.dtype}")

    def _run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run at most the largest batch, padded to the smallest by repeating the last sample."""
        missing = self.manifest.batch.min - len(inputs[0])
        if missing > 0:
            inputs = [np.concatenate([values, np.repeat(values[-1:], missing, axis=0)]) for values in inputs]
        # with the type named: an array may hold its bytes in the other order
        arrays = (np.ascontiguousarray(v, spec.dtype) for v, spec in zip(inputs, self.manifest.inputs, strict=True))
        outputs = self.runner.run_all(*arrays)
        return [output[: len(output) - missing] for output in outputs] if missing > 0 else outputs


def _zeros(spec: TensorSpec, samples: int) -> NDArray[Any]:
    return np.zeros((samples, *(edge or 1 for edge in spec.shape[1:])), spec.dtype)
