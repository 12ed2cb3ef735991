"""The child process: one subject, opened and run on command.

Each subject has a process of its own, so that its memory is its own, thread pools of one runtime do not disturb
another, and a crash is a row and not the end of the run. Commands and answers are JSON objects, a line each; whatever
libraries print goes to stderr.

    python -m repmlp_deploy.bench.worker
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bench.load.answers import error_allowed
from repmlp_deploy.bench.load.pictures import image_like, synthetic_jpeg
from repmlp_deploy.bench.load.ways import Plan, Source
from repmlp_deploy.bench.measure import machine
from repmlp_deploy.bench.measure.results import ColdStart, Error
from repmlp_deploy.bench.measure.timing import time_calls, warm_up
from repmlp_deploy.bench.subjects.table import SUBJECTS, Job, OpenedSubject, open_subject
from repmlp_deploy.bundle import Probe
from repmlp_deploy.errors import InputError, RepMLPError
from repmlp_deploy.numerics import compare
from repmlp_deploy.runtime.images import levels_of, network_input
from repmlp_deploy.runtime.predictor import predictions_from_logits

if TYPE_CHECKING:
    from repmlp_deploy.bench.load.driver import Driver

__all__ = ["Worker", "main"]

_PROFILED_CALLS = 10
_DEVICE_CALLS = 30


class Worker:
    """Run commands; every method that is a command takes and returns only JSON types."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._subject: OpenedSubject | None = None
        self._inputs: dict[int, NDArray[Any]] = {}
        self._driver: Driver | None = None

    def load(self, job: dict[str, Any], shape: list[int], batch: int) -> dict[str, Any]:
        """Import the runtime, open the subject, run it once: the cold start."""
        self._job = Job.model_validate(job)
        if self._job.card is None:
            raise InputError("a job needs a card")
        self._shape = tuple(shape)
        inputs = self._batch(batch)
        started = time.perf_counter()
        subject = SUBJECTS[self._job.format]
        for module in (subject.package, subject.opener.split(":")[0]):
            importlib.import_module(module)
        imported = time.perf_counter()
        imports_bytes = machine.resident_bytes()
        self._subject = open_subject(self._job)
        loaded = time.perf_counter()
        self._subject.run(inputs)
        first = time.perf_counter()
        cold = ColdStart(
            import_s=imported - started, load_s=loaded - imported, first_ms=1e3 * (first - loaded), batch=batch
        )
        return {"cold": cold.model_dump(), "imports_bytes": imports_bytes, "proof": self._opened.proof}

    def check(self, probe: str) -> dict[str, Any]:
        """Measure the distance from the trained network on the probe in this file."""
        recorded = Probe.from_bytes(Path(probe).read_bytes())
        result = compare(self._opened.run(recorded.inputs), recorded.reference)
        allowed = error_allowed("fp32" if self._job is None else self._job.precision, recorded)
        return Error(max_abs=result.max_abs, max_rel=result.max_rel, top1=result.top1, allowed=allowed).model_dump()

    def warm(self, batch: int, mode: str, seconds: float, gap_ms: float) -> dict[str, Any]:
        """Begin the peak of resident memory anew, without what loading took, and warm up."""
        machine.reset_peak()
        return warm_up(self._call(batch, mode), seconds, gap_ms=gap_ms).model_dump()

    def time(self, batch: int, mode: str, seconds: float, gap_ms: float, least: int) -> list[float]:
        """Return the latencies of one slice of a round, in milliseconds."""
        return time_calls(self._call(batch, mode), seconds, gap_ms=gap_ms, least=least)

    def memory(self) -> int:
        """Return the peak of resident memory since the last warm-up began, in bytes."""
        return machine.peak_bytes()

    def device(self, batch: int) -> dict[str, float]:
        """Return the milliseconds of a batch by the device's own clock under its name; nothing without such a clock."""
        found = self._opened.device_ms(self._batch(batch), _DEVICE_CALLS)
        return {} if found is None else {f"device_ms at batch {batch}": found}

    def profile(self, batch: int) -> list[dict[str, Any]]:
        """Return milliseconds per call by stage and kind of operation."""
        return [line.model_dump() for line in self._opened.profile(self._batch(batch), _PROFILED_CALLS)]

    @staticmethod
    def peaks(threads: int, device: str = "cpu") -> dict[str, Any]:
        """Measure what the machine, or its GPU, can do at best."""
        if device == "cuda":
            from repmlp_deploy.bench.subjects.gpu_peaks import measure_gpu_peaks  # noqa: PLC0415 - see below

            return measure_gpu_peaks().model_dump()
        from repmlp_deploy.bench.measure.peaks import measure_peaks  # noqa: PLC0415 - torch is not for every worker

        return measure_peaks(threads).model_dump()

    def scenario(  # noqa: PLR0913 - what the parent knows
        self, way: str, source: Source, plan: dict[str, Any], probe: str, smallest: int, largest: int
    ) -> dict[str, Any]:
        """Run a scenario in one way: see `Driver.run`."""
        if self._driver is None:
            from repmlp_deploy.bench.load.driver import Driver  # noqa: PLC0415 - needs the load generator

            if self._job is None:
                raise InputError("no subject is loaded")
            self._driver = Driver(self._job, self._opened, smallest, largest, Path(probe))
        return self._driver.run(way, source, Plan(**plan)).model_dump()

    @property
    def _opened(self) -> OpenedSubject:
        if self._subject is None:
            raise InputError("no subject is loaded")
        return self._subject

    def _batch(self, size: int) -> NDArray[Any]:
        """Return inputs that look like images, the same in every process; levels if the graph normalises."""
        if size not in self._inputs:
            how = None if self._job is None or self._job.card is None else self._job.card.preprocessing
            if how is not None and how.input == "uint8":
                height, width, channels = self._shape
                inputs: NDArray[Any] = levels_of(image_like((channels, height, width), size), how)
            else:
                inputs = image_like(self._shape, size)
            self._inputs = {size: inputs}  # one size at a time: they count as memory
        return self._inputs[size]

    def _call(self, batch: int, mode: str) -> Callable[[], object]:
        subject = self._opened
        if mode != "end-to-end":
            inputs = self._batch(batch)
            return lambda: subject.run(inputs)
        if self._job is None or self._job.card is None:
            raise InputError("a job needs a card")
        how = self._job.card.preprocessing
        pictures = [synthetic_jpeg(seed) for seed in range(min(batch, 8))]
        files = [pictures[i % len(pictures)] for i in range(batch)]

        def predict() -> object:
            stacked = np.stack([network_input(file, how)[0] for file in files])
            return predictions_from_logits(subject.run(stacked), None)

        return predict


COMMANDS = ("load", "check", "warm", "time", "memory", "profile", "peaks", "device", "scenario")


def main() -> None:
    """Answer commands from stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = {"value": _run(worker, name, command)}
        except RepMLPError as error:
            answer = {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises becomes the row's reason
            said = (str(error).splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {said[:300]}"}
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()


def _run(worker: Worker, name: str, arguments: dict[str, Any]) -> Any:
    if name not in COMMANDS:
        raise InputError(f"no command {name!r}")
    return getattr(worker, name)(**arguments)


if __name__ == "__main__":
    main()
