"""Requests of many callers, gathered into batches.

A free worker takes what waits at once, so a lone request is never delayed. While the workers are busy, requests gather,
and the next batch is as large as they make it. A delay, where one is set, applies only after a batch of several
requests: it is a sign that more are on their way.

With a target, a batch is no larger than what lets its first request keep the target, by what batches took so far. A
request that can no longer keep it goes behind those that still can. A burst then makes those late that it must, and
not all that come after them.

Callers get `Future` objects, so threads, event loops and servers of any kind can wait for them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.errors import RepMLPError

__all__ = ["Batcher", "BatcherClosed", "DeadlineMissed", "Durations", "Execution", "QueueFull", "Queueing"]

Arrays = Sequence[NDArray[Any]]
Outputs = list[NDArray[Any]]


class QueueFull(RepMLPError):  # noqa: N818 - an outcome, not a defect
    """More samples wait than the queue may hold; try again later."""


class DeadlineMissed(RepMLPError):  # noqa: N818 - an outcome, not a defect
    """The request was not begun before its deadline."""


class BatcherClosed(RepMLPError):  # noqa: N818 - an outcome, not a defect
    """The batcher takes no requests any more."""


@dataclass(frozen=True)
class Execution:
    """One run of the network, for statistics.

    Attributes:
        samples: of all its requests.
        waits: seconds that each request waited in the queue.
        seconds: the run took.
        error: what the run raised, or None.
    """

    samples: int
    waits: tuple[float, ...]
    seconds: float
    error: Exception | None = None


@dataclass(frozen=True)
class Queueing:
    """How requests wait.

    Attributes:
        queue: samples that may wait. A request that finds the queue empty is always taken.
        delay: seconds that the first request of a batch may wait for others, while several come at a time.
        workers: batches that run at a time.
        observe: told of every run, from the worker's thread.
        target: seconds within which requests are to be answered where that is possible; None answers them in the
            order of their arrival.
    """

    queue: int = 1024
    delay: float = 0.0
    workers: int = 1
    observe: Callable[[Execution], None] = lambda _: None
    target: float | None = None


_PLAIN = Queueing()
_LATEST = 0.1  # share of the last run in the mean


@dataclass(eq=False)
class _Request:
    inputs: Arrays
    deadline: float | None
    future: Future[Outputs] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def samples(self) -> int:
        return len(self.inputs[0])

    def has_expired(self, now: float) -> bool:
        return self.deadline is not None and now > self.deadline


class Durations:
    """What batches of each size took, as a running mean; sizes that did not run yet are estimated from others."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}

    def note(self, samples: int, seconds: float) -> None:
        """Note a run."""
        before = self._means.get(samples, seconds)
        self._means[samples] = before + _LATEST * (seconds - before)

    def expected(self, samples: int) -> float:
        """Return the seconds of a run: those of the size, or in proportion to the nearest size; 0 before any run."""
        if not self._means:
            return 0.0
        known = self._means.get(samples)
        if known is None:
            nearest = min(self._means, key=lambda size: abs(size - samples))
            known = self._means[nearest] * samples / nearest
        return known


class Batcher:
    """Runs requests in batches: in the order of their arrival, or as a target needs it.

    Args:
        run: a batch (N, …) of every input to every output (N, …). Called from the workers' threads.
        largest: samples of a batch at most. A request that is larger runs alone.
        how: requests wait.
    """

    def __init__(self, run: Callable[[Arrays], Outputs], largest: int, how: Queueing = _PLAIN) -> None:
        self._run, self._largest = run, largest
        self._limit, self._delay, self._observe = how.queue, how.delay, how.observe
        self._changed = threading.Condition()
        self._target, self._durations = how.target, Durations()
        self._queue: deque[_Request] = deque()
        self._late: deque[_Request] = deque()  # cannot keep the target any more
        self._waiting = 0  # samples in the queue
        self._crowded = False
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{i}", daemon=True) for i in range(max(how.workers, 1))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Samples in the queue."""
        return self._waiting

    def submit(self, inputs: Arrays, *, deadline: float | None = None) -> Future[Outputs]:
        """Queue a request, and return the future of its outputs. Cancelling it takes the request out of the queue.

        Args:
            inputs: (N, …) each, with the same N. They must not change until the future is done.
            deadline: of `time.monotonic`; a request that has not begun by then fails with `DeadlineMissed`.

        Raises:
            QueueFull: too many samples wait.
            BatcherClosed: `close` was called.
        """
        request = _Request(inputs, deadline)
        with self._changed:
            if self._closed:
                raise BatcherClosed("the batcher is closed")
            if (self._queue or self._late) and self._waiting + request.samples > self._limit:
                raise QueueFull(f"{self._waiting} samples wait; the queue holds {self._limit}")
            self._queue.append(request)
            self._waiting += request.samples
            self._changed.notify_all()
        request.future.add_done_callback(self._forget)  # without the request: the future would keep its arrays
        return request.future

    def close(self) -> None:
        """Refuse further requests, and return when those in the queue are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _forget(self, future: Future[Outputs]) -> None:
        """Take the request of a cancelled future out of the queue, unless a worker has it."""
        if not future.cancelled():
            return
        with self._changed:
            for line in (self._queue, self._late):
                request = next((one for one in line if one.future is future), None)
                if request is not None:
                    line.remove(request)
                    self._waiting -= request.samples
                    break
            else:
                return
        future.set_running_or_notify_cancel()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._execute(batch)

    def _next(self) -> list[_Request] | None:
        """Wait for requests, and take a batch of them; None after the last one."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._late or self._closed)
                if not self._queue and not self._late:
                    return None
                if self._delay and self._crowded and self._queue:
                    left = self._queue[0].arrived + self._delay - time.monotonic()
                    self._changed.wait_for(lambda: self._waiting >= self._largest or self._closed, timeout=left)
                batch = self._taken()
            if batch:
                return batch

    def _taken(self) -> list[_Request]:
        """Take requests from the queue while they fit into a batch; leave out those that nobody waits for."""
        batch: list[_Request] = []
        total, now = 0, time.monotonic()
        line = self._next_in_line(now)
        while line and (not total or self._fits(total + line[0].samples, batch[0], now)):
            request = self._begun(line, now)
            if request is not None:
                batch.append(request)
                total += request.samples
        self._crowded = len(batch) > 1
        return batch

    def _next_in_line(self, now: float) -> deque[_Request]:
        """Return those that can keep the target; those that cannot, if there are no others."""
        while self._queue and self._is_late(self._queue[0], now):
            self._late.append(self._queue.popleft())
        while self._late and self._late[0].has_expired(now):
            self._begun(self._late, now)
        return self._queue or self._late

    def _begun(self, line: deque[_Request], now: float) -> _Request | None:
        """Take the first request out of a line and return it; None if nobody waits for it or its deadline passed."""
        request = line.popleft()
        self._waiting -= request.samples
        if not request.future.set_running_or_notify_cancel():
            return None
        if request.has_expired(now):
            late = now - request.arrived
            request.future.set_exception(DeadlineMissed(f"the deadline passed after {late:.3f} s in the queue"))
            return None
        return request

    def _is_late(self, request: _Request, now: float) -> bool:
        if self._target is None:
            return False
        return now + self._durations.expected(request.samples) > request.arrived + self._target

    def _fits(self, samples: int, first: _Request, now: float) -> bool:
        """Return whether a batch may have so many samples: its first request keeps the target, if it can at all."""
        if samples > self._largest:
            return False
        if self._target is None or self._is_late(first, now):
            return True
        return now + self._durations.expected(samples) <= first.arrived + self._target

    def _execute(self, batch: list[_Request]) -> None:
        start = time.monotonic()
        waits = tuple(start - request.arrived for request in batch)
        error: Exception | None = None
        try:
            whole = batch[0].inputs if len(batch) == 1 else _joined(batch)
            outputs = self._run(whole)
        except Exception as raised:  # noqa: BLE001 - whatever it is belongs to those who wait
            error = raised
        samples, seconds = sum(request.samples for request in batch), time.monotonic() - start
        if error is None:
            with self._changed:
                self._durations.note(samples, seconds)
        self._observe(Execution(samples, waits, seconds, error))
        if error is None:
            offset = 0
            for request in batch:
                request.future.set_result([output[offset : offset + request.samples] for output in outputs])
                offset += request.samples
        elif len(batch) == 1:
            batch[0].future.set_exception(error)
        else:  # the fault may be one request's: the others shall not pay for it
            for request in batch:
                self._execute([request])


def _joined(batch: Sequence[_Request]) -> Outputs:
    return [np.concatenate(arrays) for arrays in zip(*(request.inputs for request in batch), strict=True)]
