"""What the load generator drives: samples become inputs, share batches, and every answer is kept to be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bench.load.answers import Answer
from repmlp_deploy.runtime.batching import Batcher, Queueing

__all__ = ["Sample", "Service", "System"]

_MOST_WAITING = 1 << 20  # samples: an offline run hands over all at once
_MOST_KEPT_BYTES = 1 << 28


class Sample(Protocol):
    """What arrives: a number for the answer, and which sample it is."""

    @property
    def id(self) -> int:
        """Of the answer."""
        ...

    @property
    def index(self) -> int:
        """Of the sample."""
        ...


@dataclass(frozen=True)
class Service:
    """How samples are served.

    Attributes:
        run: a batch (N, …) to its output (N, …); called from several threads if there are several workers.
        prepare: index of a sample to the network's input for it, (1, …).
        finish: what else is done with an output before the sample counts as answered.
        largest: samples of a batch at most.
        workers: batches that run at a time.
        decoders: threads that prepare samples; 0 prepares them where they arrive.
        target: see `Queueing`.
    """

    run: Callable[[NDArray[Any]], NDArray[np.float32]]
    prepare: Callable[[int], NDArray[Any]]
    finish: Callable[[NDArray[np.float32]], object]
    largest: int
    workers: int
    decoders: int
    target: float | None = None


class System:
    """A service under load; one instance for one run.

    Args:
        service: how samples are served.
        complete: told the id of every sample when it is answered, or has failed.

    Attributes:
        answers: what came back, until they are `_MOST_KEPT_BYTES`.
        answered: how many samples came back.
        failures: what samples failed with.
    """

    def __init__(self, service: Service, complete: Callable[[int], None]) -> None:
        self.answers: list[Answer] = []
        self.answered = 0
        self.failures: list[BaseException] = []
        self._service, self._complete = service, complete
        self._bytes = 0
        queueing = Queueing(_MOST_WAITING, workers=service.workers, target=service.target)
        self._batcher = Batcher(lambda inputs: [service.run(inputs[0])], service.largest, queueing)
        self._threads = ThreadPoolExecutor(service.decoders, "prepare") if service.decoders else None

    def issue(self, samples: Sequence[Sample]) -> None:
        """Begin samples."""
        for sample in samples:
            if self._threads is None:
                self._begin(sample.id, sample.index)
            else:
                self._threads.submit(self._begin, sample.id, sample.index)

    def close(self) -> None:
        """Wait for the threads."""
        if self._threads is not None:
            self._threads.shutdown()
        self._batcher.close()

    def _begin(self, query: int, index: int) -> None:
        try:
            future = self._batcher.submit([self._service.prepare(index)])
        except Exception as error:  # noqa: BLE001 - a sample that is never completed would be waited for forever
            self._fail(query, error)
            return
        future.add_done_callback(lambda done: self._end(query, index, done))

    def _end(self, query: int, index: int, done: Future[list[NDArray[Any]]]) -> None:
        try:
            output = done.result()[0]
            self._service.finish(output)
        except Exception as error:  # noqa: BLE001 - see above
            self._fail(query, error)
            return
        self._complete(query)
        self.answered += 1  # by one thread at a time, or a few too few: it is for people
        self._bytes += output.nbytes
        if self._bytes <= _MOST_KEPT_BYTES:
            self.answers.append((index, output))

    def _fail(self, query: int, error: BaseException) -> None:
        self.failures.append(error)
        self._complete(query)
