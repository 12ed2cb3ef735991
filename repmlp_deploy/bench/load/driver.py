"""A subject under load, in its own process: its ways are opened when they are first needed, and proved before a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from threading import Semaphore
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bench.load.answers import Expected, error_allowed
from repmlp_deploy.bench.load.generator import complete, generate_load
from repmlp_deploy.bench.load.pictures import synthetic_jpeg
from repmlp_deploy.bench.load.system import Service, System
from repmlp_deploy.bench.load.ways import WAYS, Plan, Source
from repmlp_deploy.bench.measure.results import LoadRun
from repmlp_deploy.bench.subjects.table import Job, OpenedSubject, open_subject
from repmlp_deploy.bundle import Probe
from repmlp_deploy.errors import InputError, RepMLPError
from repmlp_deploy.runtime.images import network_input
from repmlp_deploy.runtime.predictor import predictions_from_logits

__all__ = ["Driver"]

SAMPLES = 64
_PICTURES = 8


@dataclass(frozen=True)
class _Samples:
    prepare: Callable[[int], NDArray[Any]]
    finish: Callable[[NDArray[np.float32]], object]
    expected: Expected
    decoders: int


class Driver:
    """Runs scenarios on one subject.

    Args:
        job: that the subject was opened for.
        subject: opened and checked.
        smallest, largest: samples of a batch.
        probe: file with inputs and the trained network's answers.
    """

    def __init__(self, job: Job, subject: OpenedSubject, smallest: int, largest: int, probe: Path) -> None:
        self._job, self._subject = job, subject
        self._smallest, self._largest = smallest, largest
        self._probe = Probe.from_bytes(probe.read_bytes())
        self._in_streams: OpenedSubject | None = None
        self._samples: dict[Source, _Samples] = {}
        self._proved: set[tuple[str, Source]] = set()

    def run(self, way: str, source: Source, plan: Plan) -> LoadRun:
        """Run a scenario in one way; how many samples there are, and what is expected of an offline run, is found here.

        Raises:
            VerificationError: an answer is not the network's.
            Others: whatever the runtime raises.
        """
        samples, service = self._service(way, source)
        if (way, source) not in self._proved:
            self._prove(service, samples.expected)
            self._proved.add((way, source))
        plan = replace(plan, samples=SAMPLES)
        if WAYS[way].targets and plan.scenario == "server":
            service = replace(service, target=plan.limit_ms / 1000)
        if plan.scenario == "offline":
            plan = replace(plan, rate=self._expected_rate(service))
        system = System(service, complete)
        try:
            found = generate_load(system.issue, plan)
        finally:
            system.close()
        _require_answered(system)
        worst = samples.expected.check(system.answers)
        return found.model_copy(
            update={"samples": system.answered, "compared": len(system.answers), "max_abs_error": worst}
        )

    def _service(self, way: str, source: Source) -> tuple[_Samples, Service]:
        subject, kind = self._subject, WAYS[way]
        if kind.streams:
            subject = self._streamed()
        if source not in self._samples:
            self._samples[source] = self._of_tensors() if source == "tensors" else self._of_pictures()
        samples = self._samples[source]
        service = Service(
            run=lambda batch: self._padded(subject, batch),
            prepare=samples.prepare,
            finish=samples.finish,
            largest=self._largest if kind.gathers else 1,
            workers=self._job.threads if kind.streams else 1,
            decoders=samples.decoders,
        )
        return samples, service

    def _streamed(self) -> OpenedSubject:
        """Return the same subject, opened again for as many inferences at a time as there are threads."""
        if self._in_streams is None:
            self._in_streams = open_subject(self._job.model_copy(update={"streams": self._job.threads}))
        return self._in_streams

    def _padded(self, subject: OpenedSubject, batch: NDArray[Any]) -> NDArray[np.float32]:
        missing = self._smallest - len(batch)
        if missing <= 0:
            return subject.run(batch)
        return subject.run(np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]))[:-missing]

    def _of_tensors(self) -> _Samples:
        """Return the probe's inputs as samples, each in memory of its own."""
        probe = self._probe
        inputs = [probe.inputs[i % len(probe.inputs)][None].copy() for i in range(SAMPLES)]
        allowed = error_allowed(self._job.precision, probe)
        expected = Expected(probe.reference, "the trained network", self._job.precision, allowed)
        return _Samples(inputs.__getitem__, lambda _: None, expected, decoders=0)

    def _of_pictures(self) -> _Samples:
        """Return JPEG files as samples. What the subject says of each alone must come back."""
        if self._job.card is None:
            raise InputError("a job needs a card")
        how = self._job.card.preprocessing
        files = [synthetic_jpeg(seed) for seed in range(_PICTURES)]

        def prepare(index: int) -> NDArray[Any]:
            return network_input(files[index % _PICTURES], how)[0][None]

        alone = np.concatenate([self._padded(self._subject, prepare(i)) for i in range(_PICTURES)])
        allowed = error_allowed(self._job.precision, self._probe)
        expected = Expected(alone, "those to a picture alone", self._job.precision, allowed)
        finish: Callable[[NDArray[np.float32]], object] = lambda logits: predictions_from_logits(logits, None)  # noqa: E731
        return _Samples(prepare, finish, expected, decoders=max(1, self._job.threads))

    def _prove(self, service: Service, expected: Expected) -> None:
        """Run every sample once, all at the same time, and compare the answers. It warms up, too."""
        ids, done = count(), Semaphore(0)
        system = System(service, lambda _: done.release())
        try:
            system.issue([_Arrived(next(ids), index) for index in range(SAMPLES)])
            for _ in range(SAMPLES):
                done.acquire()
        finally:
            system.close()
        _require_answered(system)
        expected.check(system.answers)

    @staticmethod
    def _expected_rate(service: Service) -> float:
        """Return samples per second of a full batch, for the length of an offline run."""
        size = service.largest
        started = perf_counter()
        service.run(np.concatenate([service.prepare(index) for index in range(size)]))
        return size / (perf_counter() - started)


@dataclass(frozen=True)
class _Arrived:
    id: int
    index: int


def _require_answered(system: System) -> None:
    """Raise what a sample failed with."""
    if not system.failures:
        return
    first = system.failures[0]
    if isinstance(first, RepMLPError):
        raise first
    raise RepMLPError(f"{len(system.failures)} samples failed, the first with {type(first).__name__}: {first}")
