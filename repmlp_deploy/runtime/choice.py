"""Which artifact runs where a bundle has several, and how many inferences run at a time.

No order of runtimes is right for every network: on a network of a few operations OpenVINO takes twice as long as ONNX
Runtime, on a large one in int8 half as long. So an export measures what it has made, and writes that into the manifest:
milliseconds of the smallest and of the best batch. The fastest artifact is opened, or the first in `RUNNERS` if it is
slower by less than a tenth. Figures of another machine still say more of a network than any order does, so they
decide there, too. With a cache folder they need not: the first start measures, and the folder keeps the result.

Runs take turns, so that what else keeps a machine busy meets all of them alike, and the shortest run counts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.bundle.manifest import ArtifactEntry
from repmlp_deploy.bundle.records import MeasuredArtifact, Speed
from repmlp_deploy.errors import DeviceError, InputError, MissingDependency, MissingDevice
from repmlp_deploy.runtime.cache import Cache, cache_key, describe_processor
from repmlp_deploy.runtime.cpus import usable_cpus
from repmlp_deploy.runtime.runner import RUNNERS, THROUGHPUT, Runner, RunnerOptions, open_named
from repmlp_deploy.text import first_line

__all__ = ["CHOICES", "measure_artifacts", "open_runner", "with_speeds"]

CHOICES = ("chosen", "streams_chosen", "passed_over")
"""The keys of a runner's details that say how it was chosen."""

_SEVERAL = 2
_MOST_ROUNDS = 20
_FEWEST_ROUNDS = 2
_ROUND_SECONDS = 0.5  # for all rounds of one batch size, if the fewest are shorter
_CLEARLY = 0.9  # of the preferred artifact's time: a smaller gain is no reason to leave the order

Milliseconds = Mapping[int, float]
"""Batch size to the milliseconds of a run."""


@dataclass(frozen=True)
class _Order:
    """Formats, the one to open first, and why."""

    names: tuple[str, ...]
    why: str = ""


def open_runner(bundle: Bundle, artifact_format: str | None, options: RunnerOptions) -> Runner:
    """Open one artifact; by default the fastest that the bundle has and this machine can run.

    Where none was asked for, the runner's `details` say the choice: `chosen`, why this one, if there were several, and
    `passed_over`, which of those before it cannot run here and why. `streams_chosen` says how many inferences run at a
    time, and why, if that was left to a measurement.

    Raises:
        InputError: the bundle has nothing that can be run, or nothing that runs on the device.
        MissingDependency: the runtime is not installed.
        MissingDevice: the device, or what the precision needs of it, is not there.
        OutputError: the cache folder cannot be made, even if the artifact that runs keeps nothing there.
    """
    if options.cache is not None:
        Cache(options.cache)
    if options.streams == THROUGHPUT:
        single = _opened(bundle, artifact_format, replace(options, streams=1))
        return _with_best_streams(bundle, single, options)
    return _opened(bundle, artifact_format, options)


def measure_artifacts(bundle: Bundle, options: RunnerOptions | None = None) -> dict[str, Speed]:
    """Return how fast the artifacts are that a CPU runs; nothing of those that cannot be run here."""
    options = options or RunnerOptions()
    names = [name for name in RUNNERS if name in bundle.manifest.artifacts and "cpu" in RUNNERS[name].devices]
    with ExitStack() as stack:
        runners = _runners(bundle, names, options, stack)
        sizes = sorted({bundle.manifest.batch.min, bundle.manifest.batch.opt})
        measured = _measure(bundle, runners, sizes)
        return {
            name: Speed(
                machine=_machine(),
                device=runners[name].device,
                runtime=str(runners[name].details["runtime"]),
                batch_ms=dict(times),
            )
            for name, times in measured.items()
        }


def with_speeds(bundle: Bundle) -> Bundle:
    """Return the bundle with a measurement in the entries of its artifacts, if there is a choice between them."""
    speeds = measure_artifacts(bundle) if len(_comparable(list(bundle.manifest.artifacts))) >= _SEVERAL else {}
    if len(speeds) < _SEVERAL:
        return bundle
    entries = dict(bundle.manifest.artifacts)
    for name, speed in speeds.items():
        described = entries[name].model_dump() | MeasuredArtifact(speed=speed).model_dump(mode="json")
        entries[name] = ArtifactEntry.model_validate(described)
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"artifacts": entries}))


def _opened(bundle: Bundle, artifact_format: str | None, options: RunnerOptions) -> Runner:
    if artifact_format is not None:
        return open_named(bundle, artifact_format, options)
    order = _ordered(bundle, _fitting(bundle, options.device), options)
    errors: dict[str, MissingDependency | MissingDevice] = {}
    for name in order.names:
        try:
            runner = open_named(bundle, name, options)
        except (MissingDependency, MissingDevice) as error:
            errors[name] = error
            continue
        if errors:
            runner.details["passed_over"] = {failed: str(error) for failed, error in errors.items()}
        elif order.why:
            runner.details["chosen"] = order.why
        return runner
    raise next(errors[name] for name in RUNNERS if name in errors)


def _fitting(bundle: Bundle, device: str | None) -> list[str]:
    """Return the formats that may be opened, in the order of `RUNNERS`."""
    runnable = [name for name in RUNNERS if name in bundle.manifest.artifacts]
    if not runnable:
        have, can = ", ".join(bundle.manifest.artifacts), ", ".join(RUNNERS)
        raise InputError(f"{bundle.manifest.name} holds {have}; Predictor runs {can}: export one of these too")
    fitting = [name for name in runnable if device is None or device in RUNNERS[name].devices]
    if not fitting:
        known = dict.fromkeys(device for name in runnable for device in RUNNERS[name].devices)
        raise InputError(f"device is {device!r}; expected one of {', '.join(known)}")
    return fitting


def _comparable(names: Sequence[str]) -> list[str]:
    """Return the formats that a CPU runs. An engine has not run where it was built, so nothing was measured of it."""
    return [name for name in names if name in RUNNERS and "cpu" in RUNNERS[name].devices]


def _ordered(bundle: Bundle, names: list[str], options: RunnerOptions) -> _Order:
    """Return the formats in the order in which to try them."""
    compared = _comparable(names)
    if len(compared) < _SEVERAL or options.device not in (None, "cpu"):
        return _Order(tuple(names))
    recorded = _recorded(bundle, compared)
    here = all(speed.machine == _machine() for speed in recorded.values())
    if len(recorded) == len(compared) and (here or options.cache is None):
        where = "at the export" if here else "at the export, on another machine"
        return _fastest_first(names, {name: speed.batch_ms for name, speed in recorded.items()}, where, options)
    if options.cache is not None:
        return _fastest_first(names, _kept(bundle, compared, options, Cache(options.cache)), "here", options)
    return _Order(tuple(names), f"{names[0]}: the first in order, as nothing was measured")


def _recorded(bundle: Bundle, names: Sequence[str]) -> dict[str, Speed]:
    """Return what the manifest says of the formats' speed."""
    said = {name: bundle.artifact(name).record(MeasuredArtifact, name).speed for name in names}
    return {name: speed for name, speed in said.items() if speed is not None}


def _kept(bundle: Bundle, names: Sequence[str], options: RunnerOptions, cache: Cache) -> Mapping[str, Milliseconds]:
    """Return the formats' speed as the cache has it, or measured now."""
    digests = [bundle.artifact(name).sha256 for name in names]
    versions = [RUNNERS[name].versions() for name in names]  # another release, or one more runtime, is measured anew
    key = cache_key("speed", _machine(), options.threads, options.streams, *names, *digests, *versions)
    stored = cache.load(key)
    if stored is not None:
        told: dict[str, dict[str, float]] = json.loads(stored)
        return {name: {int(size): ms for size, ms in times.items()} for name, times in told.items()}
    with ExitStack() as stack:
        sizes = sorted({bundle.manifest.batch.min, bundle.manifest.batch.opt})
        measured = _measure(bundle, _runners(bundle, names, options, stack), sizes)
    cache.store(key, json.dumps(measured).encode())
    return measured


def _fastest_first(names: list[str], speeds: Mapping[str, Milliseconds], where: str, options: RunnerOptions) -> _Order:
    """Return the formats with the fastest first, or as they are if none is clearly faster than the first."""
    scores = {name: _score(times, only_largest=options.streams != 1) for name, times in speeds.items()}
    if not scores:
        return _Order(tuple(names))
    best = min(scores, key=lambda name: scores[name])
    first = next(name for name in names if name in scores)
    if scores[best] > _CLEARLY * scores[first]:
        best = first
    told = "; ".join(
        f"batch {size}: " + ", ".join(f"{name} {times[size]:.3g} ms" for name, times in speeds.items())
        for size in sorted(set.intersection(*(set(times) for times in speeds.values())))
    )
    reason = "the fastest" if scores[best] == min(scores.values()) else "as fast as any, and the first in order"
    return _Order((best, *(name for name in names if name != best)), f"{best}: {reason}, measured {where} ({told})")


def _score(times: Milliseconds, *, only_largest: bool) -> float:
    """Return what to compare: the geometric mean over the batch sizes, or the largest alone for throughput."""
    counted = [times[max(times)]] if only_largest else list(times.values())
    return math.exp(sum(math.log(ms) for ms in counted) / len(counted))


def _with_best_streams(bundle: Bundle, single: Runner, options: RunnerOptions) -> Runner:
    """Return the runner with one inference at a time, or one with as many as there are CPUs, whichever is faster."""
    cpus = usable_cpus()
    if cpus == 1 or single.device != "cpu":
        single.details["streams_chosen"] = "1: there is one CPU" if cpus == 1 else f"1: it runs on {single.device}"
        return single
    runners, failed, samples = {"1": single}, "", bundle.manifest.batch.opt * cpus
    with ExitStack() as stack:
        stack.callback(single.close)
        try:
            runners[str(cpus)] = open_named(bundle, single.format, replace(options, streams=cpus))
            stack.callback(runners[str(cpus)].close)
        except DeviceError as error:
            failed = f", {cpus} at a time failed: {first_line(error)}"
        measured = _measure(bundle, runners, [samples])
        rates = {name: 1000 * samples / times[samples] for name, times in measured.items()}
        best = max(runners, key=lambda name: rates.get(name, 0.0))
        stack.pop_all()
    for name, runner in runners.items():
        if name != best:
            runner.close()
    chosen, streams = runners[best], runners[best].details["streams"]
    if "chosen" in single.details:
        chosen.details["chosen"] = single.details["chosen"]
    told = ", ".join(f"{name} at a time {rates[name]:.3g} samples/s" for name in runners if name in rates)
    failed += "".join(f", {name} at a time failed" for name in runners if name not in rates)
    why = f"the fastest, measured here ({told}{failed})" if told else f"nothing could be measured{failed}"
    chosen.details["streams_chosen"] = f"{streams}: {why}"
    return chosen


def _runners(bundle: Bundle, names: Sequence[str], options: RunnerOptions, stack: ExitStack) -> dict[str, Runner]:
    """Return the runners of the formats that run here; `stack` closes them."""
    runners = {}
    for name in names:
        try:
            runners[name] = open_named(bundle, name, options)
        except (MissingDependency, MissingDevice, DeviceError):
            continue
        stack.callback(runners[name].close)
    return runners


def _measure(bundle: Bundle, runners: Mapping[str, Runner], sizes: Sequence[int]) -> dict[str, dict[int, float]]:
    """Return the milliseconds of the shortest run of every size; runs of the probe's samples, in turns."""
    times: dict[str, dict[int, float]] = {name: {} for name in runners}

    def run_each(inputs: Sequence[Any]) -> dict[str, float]:
        taken = {}
        for name in list(times):
            try:
                taken[name] = _milliseconds(runners[name].run_all, inputs)
            except DeviceError:  # such as too little memory: what cannot run is not compared
                del times[name]
        return taken

    for size in sizes:
        inputs, _ = bundle.probe().batches(size)
        total = max(sum(run_each(inputs).values()), 1e-3)
        rounds = min(max(int(1000 * _ROUND_SECONDS / total), _FEWEST_ROUNDS), _MOST_ROUNDS)
        for _ in range(rounds):
            for name, taken in run_each(inputs).items():
                times[name][size] = min(times[name].get(size, taken), taken)
    return {name: {size: float(f"{ms:.4g}") for size, ms in found.items()} for name, found in times.items()}


def _milliseconds(run: Callable[..., Any], inputs: Sequence[Any]) -> float:
    start = time.perf_counter()
    run(*inputs)
    return 1000 * (time.perf_counter() - start)


def _machine() -> str:
    """Return a name for what decides how fast a CPU is for this process."""
    return cache_key("machine", describe_processor(), usable_cpus())[:16]
