"""`repmlp-map` on this machine: the parts of a job are made by processes.

Decoding a small image is mostly Python, so threads of one process wait for each other's interpreter. Every process has
a Predictor of its own, checks it once, and writes whole parts. One that dies is replaced, and the part it was at is
made again, so rows are neither lost nor repeated. When the first process dies, in whatever way, the others end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any

from repmlp_deploy.errors import BundleError, DeviceError, InputError, MissingDevice, OutputError, VerificationError
from repmlp_deploy.evaluation.filling import Parts, chunks_of, fill_parts
from repmlp_deploy.evaluation.sources import Source
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.text import first_line

__all__ = ["Processes"]

_CHUNKS_PER_WORKER = 4  # a chunk is read in one go; few of them keep archives from being read again and again
_MOST_DEATHS = 5  # in a row, without a part between them
_LEAST_PARTS = 2  # for one process to start another

_SENT = (BundleError, DeviceError, InputError, MissingDevice, OutputError, VerificationError)
"""Errors that arrive as they are."""


@dataclass
class _Worker:
    """A process, the pipe to it, and the parts that it has to write, the present one first."""

    process: Any
    pipe: Connection
    chunk: deque[int]


@dataclass(frozen=True)
class Processes:
    """The engine `local` with several processes; see `mapping.Engine`.

    Attributes:
        device: what each process runs on; None for the best there is.
        threads: of one inference.
        count: processes; by default one per `threads` CPUs.
    """

    device: str | None = None
    threads: int = 1
    count: int | None = None

    def __call__(
        self, predictor: Predictor, source: Source, parts: Parts, missing: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """Yield each part that a process has written; where there is one to write, this process does it.

        Raises:
            DeviceError: the processes die one after the other.
            RepMLPError: what a process raises.
        """
        count = min(self.count or max(1, usable_cpus() // self.threads), len(missing))
        folder = predictor.bundle.folder
        if count < _LEAST_PARTS or folder is None:
            yield from fill_parts(predictor, source, parts, missing)
            return
        how = {"format": predictor.format, "device": self.device, "threads": self.threads}
        given = (str(folder.resolve()), how, source, replace(parts, folder=parts.folder.resolve()))
        workers: list[_Worker] = []
        try:
            yield from _run(workers, given, count, chunks_of(missing, count * _CHUNKS_PER_WORKER))
        finally:
            for worker in workers:
                worker.pipe.close()
                worker.process.kill()  # what it has not finished is nobody's
                worker.process.join()


def _run(
    workers: list[_Worker], given: tuple[Any, ...], count: int, chunks: deque[deque[int]]
) -> Iterator[tuple[int, int]]:
    """Keep `count` processes at a chunk each until there are no more; `workers` are those that live."""
    deaths = 0
    workers.extend(_started(given, chunks.popleft()) for _ in range(min(count, len(chunks))))
    while workers:
        ready = {id(pipe) for pipe in wait([worker.pipe for worker in workers])}
        for worker in [worker for worker in workers if id(worker.pipe) in ready]:
            try:
                said = worker.pipe.recv()
            except (EOFError, OSError):
                deaths += 1
                workers.remove(worker)
                _end(worker)
                if deaths > _MOST_DEATHS:
                    code = worker.process.exitcode
                    raise DeviceError(f"{deaths} processes died in a row, the last with code {code}") from None
                workers.append(_started(given, worker.chunk))
                continue
            if isinstance(said, Exception):
                raise said
            deaths = 0
            worker.chunk.popleft()
            yield said
            if worker.chunk:
                continue
            if chunks:
                worker.chunk = chunks.popleft()
                _tell(worker)
            else:
                workers.remove(worker)
                _end(worker)


def _started(given: tuple[Any, ...], chunk: deque[int]) -> _Worker:
    """Start a process on a chunk."""
    context = multiprocessing.get_context("spawn")  # a fork would share the threads and locks of the runtime
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, *given), name="repmlp-map", daemon=True)
    process.start()
    theirs.close()  # so that its death closes the pipe
    worker = _Worker(process, ours, chunk)
    _tell(worker)
    return worker


def _tell(worker: _Worker) -> None:
    try:
        worker.pipe.send(list(worker.chunk))
    except OSError:  # it died: receiving says so, too
        return


def _end(worker: _Worker) -> None:
    worker.pipe.close()  # it ends when it sees that
    worker.process.join()


def _work(pipe: Connection, bundle: str, how: dict[str, Any], source: Source, parts: Parts) -> None:
    """Write chunk after chunk, and say so after every part: what a process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends the others
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        with Predictor(bundle, check=True, **how) as predictor:
            while True:
                for written in fill_parts(predictor, source, parts, pipe.recv(), readers=1):
                    pipe.send(written)
    except (EOFError, BrokenPipeError):  # there is no more to do, or nobody to do it for
        return
    except _SENT as error:
        pipe.send(error if type(error) in _SENT else InputError(str(error)))
    except Exception as error:  # noqa: BLE001 - it must reach the first process
        pipe.send(InputError(f"a process failed: {type(error).__name__}: {first_line(error)}"))


def _end_with_parent() -> None:
    """End this process in the moment in which the first one dies, whatever it is doing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
