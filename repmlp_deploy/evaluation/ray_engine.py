"""`--engine ray` of `repmlp-map` and `repmlp-eval`: actors do the work, on this machine or on a Ray cluster.

Each actor opens the bundle and checks it once, then writes parts as the local engine does: whole or not at all. An
actor that dies is replaced, and the part it was at is made again, so rows are neither lost nor repeated. These are
plain actors and not Ray Data: a part is a file, from which a run goes on whatever died, under either engine. Ray Data's
own checkpoints hung on a machine with two CPUs, in Ray 2.60. `repmlp-eval` counts what actors count in the order of the
data, so its figures are those of this process. The only module of the evaluation that uses Ray.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repmlp_deploy.errors import DeviceError, InputError, RepMLPError
from repmlp_deploy.evaluation.datasets import Sample
from repmlp_deploy.evaluation.filling import Parts, chunks_of, fill_parts
from repmlp_deploy.evaluation.judging import Judged, Judging, Run, judge
from repmlp_deploy.evaluation.sources import Source
from repmlp_deploy.runtime.predictor import Predictor
from repmlp_deploy.runtime.ray_cluster import join_or_start, leave, ray
from repmlp_deploy.text import first_line

__all__ = ["Actors", "Judges"]

_CHUNKS_PER_ACTOR = 4  # a chunk is read in one go; few of them keep archives from being read again and again
_MOST_DEATHS = 5  # in a row, without a part between them
_SAMPLES = 256  # of an evaluation that an actor is given at a time
_AHEAD = 2  # such lots per actor, so that none waits for the driver


class _Worker:
    """Writes parts: the class of an actor."""

    def __init__(self, folder: str, bundle: str, how: dict[str, Any], source: Source, parts: Parts) -> None:
        _enter(folder)
        self._opened, self._source, self._parts = (bundle, how), source, parts
        self._predictor: Predictor | None = None
        self._filling: Iterator[tuple[int, int]] = iter(())

    def begin(self, chunk: Sequence[int]) -> tuple[int, int]:
        """Write the first part of a chunk; see `following`."""
        if self._predictor is None:
            bundle, how = self._opened
            self._predictor = Predictor(bundle, check=True, **how)
        self._filling = fill_parts(
            self._predictor, self._source, self._parts, chunk, readers=self._opened[1]["threads"]
        )
        return self.following()

    def following(self) -> tuple[int, int]:
        """Write the next part of the chunk; return its number and how many of its images have no prediction."""
        return next(self._filling)


@dataclass(frozen=True)
class Actors:
    """The engine `ray`; see `mapping.Engine`.

    Attributes:
        device: what each actor runs on; None for the best there is.
        threads: of one inference; an actor asks Ray for so many CPUs.
        gpus: GPUs that an actor asks Ray for.
        count: actors; by default as many as the CPUs or the GPUs of the cluster allow.
    """

    device: str | None = None
    threads: int = 1
    gpus: float = 0
    count: int | None = None

    def __call__(
        self, predictor: Predictor, source: Source, parts: Parts, missing: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """Yield each part that an actor has written.

        Raises:
            DeviceError: Ray cannot be started, or its actors die one after the other.
            RepMLPError: what an actor raises.
        """
        with _cluster():
            how = {"format": predictor.format, "device": self.device, "threads": self.threads}
            given = (str(Path.cwd()), _folder(predictor), how, ray.put(source), _absolute(parts))
            actors = self.count or _actors(self.threads, self.gpus)
            yield from self._run(given, chunks_of(missing, actors * _CHUNKS_PER_ACTOR), actors)

    def _run(self, given: tuple[Any, ...], chunks: deque[deque[int]], actors: int) -> Iterator[tuple[int, int]]:
        """Keep every actor at a chunk of its own until there are no more."""
        worker = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_restarts=0)(_Worker)
        under_way: dict[Any, tuple[Any, deque[int]]] = {}
        deaths = 0

        def begin(actor: Any) -> None:
            chunk = chunks.popleft()
            under_way[actor.begin.remote(list(chunk))] = (actor, chunk)

        for _ in range(min(actors, len(chunks))):
            begin(worker.remote(*given))
        while under_way:
            (ready, *_), _ = ray.wait([*under_way])
            actor, chunk = under_way.pop(ready)
            try:
                written = ray.get(ready)
            except ray.exceptions.RayActorError as error:
                deaths += 1
                if deaths > _MOST_DEATHS:
                    raise DeviceError(f"{deaths} workers of Ray died in a row: {first_line(error)}") from None
                chunks.appendleft(chunk)
                begin(worker.remote(*given))
                continue
            deaths = 0
            chunk.popleft()
            yield written
            if chunk:
                under_way[actor.following.remote()] = (actor, chunk)
            elif chunks:
                begin(actor)


class _Judge:
    """Judges samples: the class of an actor."""

    def __init__(self, folder: str, opened: Callable[[], Mapping[str, Run]], how: Judging) -> None:
        _enter(folder)
        self._runs, self._how = opened(), how

    def judged(self, samples: Sequence[Sample]) -> list[Judged]:
        """Return what the batches of these samples count."""
        return list(judge(self._how, self._runs, samples))


@dataclass(frozen=True)
class Judges:
    """The engine `ray` of an evaluation; see `judging.Engine`.

    Attributes:
        opened: opens the artifacts, in an actor.
        threads: of one inference; an actor asks Ray for so many CPUs.
        gpus: GPUs that an actor asks Ray for.
        count: actors; by default as many as the CPUs or the GPUs of the cluster allow.
    """

    opened: Callable[[], Mapping[str, Run]]
    threads: int = 1
    gpus: float = 0
    count: int | None = None

    def __call__(self, how: Judging, runs: Mapping[str, Run], samples: Sequence[Sample]) -> Iterator[Judged]:
        """Yield what every batch counts, in order; `runs` are opened again by the actors.

        Raises:
            DeviceError: Ray cannot be started, or its actors die one after the other.
            RepMLPError: what an actor raises.
        """
        del runs
        each = max(1, _SAMPLES // how.batch) * how.batch  # whole batches: the same as in one process
        waiting = deque(samples[start : start + each] for start in range(0, len(samples), each))
        with _cluster():
            judge_ = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_restarts=0)(_Judge)
            given = (str(Path.cwd()), self.opened, replace(how, workers=how.workers or self.threads))
            count = min(self.count or _actors(self.threads, self.gpus), len(waiting))
            actors = [judge_.remote(*given) for _ in range(count)]
            under_way: deque[tuple[Sequence[Sample], int, Any, Any]] = deque()
            deaths = 0

            def begin(some: Sequence[Sample], place: int) -> tuple[Sequence[Sample], int, Any, Any]:
                return some, place, actors[place], actors[place].judged.remote(some)

            for i in range(min(_AHEAD * count, len(waiting))):
                under_way.append(begin(waiting.popleft(), i % count))
            while under_way:
                some, place, actor, answer = under_way.popleft()
                try:
                    judged = ray.get(answer)
                except ray.exceptions.RayActorError as error:
                    deaths += actors[place] is actor  # what else waited for it is no death of its own
                    if deaths > _MOST_DEATHS:
                        raise DeviceError(f"{deaths} workers of Ray died in a row: {first_line(error)}") from None
                    if actors[place] is actor:
                        actors[place] = judge_.remote(*given)
                    under_way.appendleft(begin(some, place))
                    continue
                deaths = 0
                if waiting:
                    under_way.append(begin(waiting.popleft(), place))
                yield from judged


@contextmanager
def _cluster() -> Iterator[None]:
    """Join or start Ray, and leave it, unless the program is in it already; what it raises becomes an error of ours."""
    already, own = ray.is_initialized(), False
    try:
        if not already:
            own = join_or_start()
        yield
    except ray.exceptions.RayTaskError as error:
        raise _meant(error) from None
    except (ray.exceptions.RayError, ConnectionError, TimeoutError) as error:
        raise DeviceError(f"Ray failed: {first_line(error)}; `ray status` shows the cluster") from None
    finally:
        if not already:
            leave(own=own)


def _actors(threads: int, gpus: float) -> int:
    """Return how many actors the cluster has room for."""
    have = ray.cluster_resources()
    return max(1, int(have.get("GPU", 0) / gpus if gpus else have.get("CPU", 1) / threads))


def _enter(folder: str) -> None:
    """Make the driver's working folder an actor's, so that relative paths mean the same."""
    if Path(folder).is_dir():
        os.chdir(folder)


def _folder(predictor: Predictor) -> str:
    folder = predictor.bundle.folder
    if folder is None:
        raise InputError("the bundle lies in no folder; actors open it from one: save it first")
    return str(folder.resolve())


def _absolute(parts: Parts) -> Parts:
    """Return the parts as an actor sees them, whose working folder may be another."""
    return replace(parts, folder=parts.folder.resolve())


def _meant(error: Any) -> RepMLPError:
    """Return what an actor raised, or one line about it."""
    if isinstance(error.cause, RepMLPError):
        return error.cause
    return InputError(f"a worker of Ray failed: {first_line(error.cause or error)}")
