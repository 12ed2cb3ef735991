"""`repmlp-map` on this machine: the parts of a job are made by processes.

Decoding a small image is mostly Python, so threads of one process wait for each other's interpreter. Every process has
a Predictor of its own, checks it once, and writes whole parts. One that dies is replaced, and the part it was at is
made again, so rows are neither lost nor repeated. When the first process dies, in whatever way, the others end: see
`process_worker`.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread
from typing import Any

from repmlp_deploy.children import child_environment
from repmlp_deploy.errors import DeviceError
from repmlp_deploy.evaluation.filling import Parts, chunks_of, fill_parts
from repmlp_deploy.evaluation.process_worker import Task
from repmlp_deploy.evaluation.sources import Source
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.predictor import Predictor

__all__ = ["Processes"]

_CHUNKS_PER_WORKER = 4  # a chunk is read in one go; few of them keep archives from being read again and again
_MOST_DEATHS = 5  # in a row, without a part between them
_LEAST_PARTS = 2  # for one process to start another


class _Worker:
    """A process, and the parts that it has to write, the present one first.

    Args:
        task: of the process.
        chunk: its first parts.
        heard: gets (this worker, what it says); None when it has died.
    """

    def __init__(self, task: Task, chunk: deque[int], heard: SimpleQueue[tuple[_Worker, Any]]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "repmlp_deploy.evaluation.process_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the first process, which ends the others
            env=child_environment(OMP_NUM_THREADS=str(task.how["threads"])),
        )
        self.chunk = chunk
        self._listener = Thread(target=self._listen, args=(heard,), daemon=True)
        self._listener.start()
        self._send(task)
        self.begin(chunk)

    def begin(self, chunk: deque[int]) -> None:
        """Give it another chunk."""
        self.chunk = chunk
        self._send(list(chunk))

    def end(self) -> int:
        """End the process, whatever it is doing: what it has not finished is nobody's. Return its exit code."""
        self._process.kill()
        code = self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not sent yet goes nowhere
                if pipe is not None:
                    pipe.close()
        return code

    def _send(self, message: Any) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):  # it died: `heard` says so, too
                pickle.dump(message, self._process.stdin)
                self._process.stdin.flush()

    def _listen(self, heard: SimpleQueue[tuple[_Worker, Any]]) -> None:
        try:
            while True:
                heard.put((self, pickle.load(self._process.stdout)))  # type: ignore[arg-type] # noqa: S301 - its own child
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            heard.put((self, None))


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
        task = Task(str(folder.resolve()), how, source, replace(parts, folder=parts.folder.resolve()))
        with ExitStack() as ends:
            yield from _run(ends, task, count, chunks_of(missing, count * _CHUNKS_PER_WORKER))


def _run(ends: ExitStack, task: Task, count: int, chunks: deque[deque[int]]) -> Iterator[tuple[int, int]]:
    """Keep `count` processes at a chunk each until there are no more; `ends` ends those that live."""
    heard: SimpleQueue[tuple[_Worker, Any]] = SimpleQueue()
    deaths, busy = 0, 0

    def start(chunk: deque[int]) -> None:
        ends.callback(_Worker(task, chunk, heard).end)

    while chunks and busy < count:
        start(chunks.popleft())
        busy += 1
    while busy:
        worker, said = heard.get()
        if said is None:
            deaths, code = deaths + 1, worker.end()
            if deaths > _MOST_DEATHS:
                raise DeviceError(f"{deaths} processes died in a row, the last with code {code}")
            start(worker.chunk)
            continue
        if isinstance(said, Exception):
            raise said
        deaths = 0
        worker.chunk.popleft()
        yield said
        if not worker.chunk and chunks:
            worker.begin(chunks.popleft())
        elif not worker.chunk:
            busy -= 1
