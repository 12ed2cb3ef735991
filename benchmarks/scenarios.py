"""Run a bundle under the scenarios of MLPerf Inference, with MLCommons' own load generator.

pip install mlcommons-loadgen
python benchmarks/scenarios.py BUNDLE [--format openvino] [--seconds 10] [--limit-ms 100] [--sources tensors,JPEG]

SingleStream: one sample after the other; the 90th percentile of latency. Offline: all samples at once; samples per
second. Server: samples arrive by a Poisson process; the highest rate whose 99th percentile of latency keeps the limit,
found by bisection, one run per step. Samples are tensors, or the bytes of 500x375 JPEG files ("JPEG").

The ways to run: one request at a time; requests that are gathered into batches, as `repmlp-serve` does; the same with
several inferences at a time. Runs are much shorter than a submission to MLPerf needs: compare the ways with each other.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlperf_loadgen as loadgen
from end_to_end import SMALL, photographs
from numpy.typing import NDArray

from repmlp_deploy import Bundle, Predictor
from repmlp_deploy.bench.measure.machine import describe_machine
from repmlp_deploy.runtime.batching import Batcher, Queueing
from repmlp_deploy.runtime.cpus import usable_cpus

SAMPLES = 64
STEPS = 5  # of the bisection
MILLION = 1_000_000

Prepare = Callable[[int], NDArray[Any]]
"""Index of a sample to the network's input for it, (1, …)."""


@dataclass
class Way:
    """A way to run: its batches, and how many of them run at a time."""

    name: str
    predictor: Predictor
    largest: int
    workers: int


class System:
    """What the load generator drives: samples become inputs in threads, and share batches."""

    def __init__(self, way: Way, prepare: Prepare, *, in_threads: bool) -> None:
        self._prepare = prepare
        queueing = Queueing(1 << 20, workers=way.workers)
        self._batcher = Batcher(lambda inputs: [way.predictor.logits(inputs[0])], way.largest, queueing)
        self._threads = ThreadPoolExecutor(usable_cpus()) if in_threads else None

    def issue(self, samples: Sequence[Any]) -> None:
        """Begin the queries; called by the load generator."""
        for sample in samples:
            if self._threads is None:
                self._submit(sample.id, sample.index)
            else:
                self._threads.submit(self._submit, sample.id, sample.index)

    def _submit(self, query: int, index: int) -> None:
        future: Future[Any] = self._batcher.submit([self._prepare(index)])
        future.add_done_callback(lambda done: self._complete(query, done))

    def _complete(self, query: int, done: Future[Any]) -> None:
        done.result()
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query, 0, 0)])

    def close(self) -> None:
        """Wait for the threads."""
        if self._threads is not None:
            self._threads.shutdown()
        self._batcher.close()


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--format")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--limit-ms", type=float, default=100)
    parser.add_argument("--sources", default="tensors,JPEG")
    given = parser.parse_args()
    machine = describe_machine()
    print(f"{machine['cpu']}, {usable_cpus()} cores, flags {', '.join(machine['cpu_flags'])}\n")
    bundle = Bundle.load(given.bundle)
    with (
        tempfile.TemporaryDirectory() as folder,
        Predictor(bundle, format=given.format) as single,
        Predictor(bundle, format=given.format, streams=usable_cpus()) as several,
    ):
        print(f"{bundle.manifest.name}: {single.format}, streams {several.details['streams']}\n")
        encoded = [path.read_bytes() for path in photographs(Path(folder), SMALL, SAMPLES)]
        tensors = [single.preprocess(one)[None] for one in encoded]
        sources: dict[str, Prepare] = {
            "tensors": lambda i: tensors[i],
            "JPEG": lambda i: single.preprocess(encoded[i])[None],
        }
        largest = bundle.manifest.batch.max
        ways = [
            Way("one request at a time", single, 1, 1),
            Way("batched", single, largest, 1),
            Way("batched, streams", several, largest, usable_cpus()),
        ]
        print("| | SingleStream, p90 ms | Offline, samples/s | Server, samples/s |\n|---|--:|--:|--:|")
        for source in given.sources.split(","):
            prepare = sources[source]
            for way in ways:
                print(f"| {way.name}, {source} | {_row(way, prepare, given, source)} |", flush=True)


def _row(way: Way, prepare: Prepare, given: argparse.Namespace, source: str) -> str:
    system = System(way, prepare, in_threads=source == "JPEG")
    try:
        single = _run(system, loadgen.TestScenario.SingleStream, given.seconds)
        offline = _run(system, loadgen.TestScenario.Offline, given.seconds)
        rate = _found(offline, r"Samples per second: ([\d.e+]+)")
        highest = _highest_rate(system, rate, given)
    finally:
        system.close()
    latency = _found(single, r"90\.0+ percentile latency \(ns\)\s*: (\d+)") / MILLION
    return f"{latency:.1f} | {rate:.1f} | {highest:.1f}"


def _highest_rate(system: System, rate: float, given: argparse.Namespace) -> float:
    """Return the highest rate that keeps the limit, between nothing and what Offline reached."""
    low, high = 0.0, rate
    for _ in range(STEPS):
        tried = (low + high) / 2
        said = _run(system, loadgen.TestScenario.Server, given.seconds, tried, given.limit_ms)
        late = _found(said, r"99\.0+ percentile latency \(ns\)\s*: (\d+)") / MILLION
        low, high = (tried, high) if late <= given.limit_ms else (low, tried)
    return low


def _run(system: System, scenario: Any, seconds: float, rate: float = 0, limit_ms: float = 0) -> str:
    """Run one scenario and return the load generator's summary."""
    settings = loadgen.TestSettings()
    settings.scenario, settings.mode = scenario, loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms, settings.max_duration_ms = int(1000 * seconds), int(4000 * seconds)
    settings.min_query_count = 32 if scenario == loadgen.TestScenario.SingleStream else 1
    if scenario == loadgen.TestScenario.Offline:
        settings.offline_expected_qps = SAMPLES / seconds
        settings.min_query_count = 4 * SAMPLES
    if rate:
        settings.server_target_qps, settings.server_target_latency_percentile = rate, 0.99
        settings.server_target_latency_ns = int(limit_ms * MILLION)
        settings.min_query_count = max(100, int(rate * seconds))
    with tempfile.TemporaryDirectory() as folder:
        logs = loadgen.LogSettings()
        logs.log_output.outdir, logs.log_output.copy_summary_to_stdout = folder, False
        logs.enable_trace = False
        under_test = loadgen.ConstructSUT(system.issue, lambda: None)
        library = loadgen.ConstructQSL(SAMPLES, SAMPLES, lambda _: None, lambda _: None)
        loadgen.StartTestWithLogSettings(under_test, library, settings, logs)
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(under_test)
        return Path(folder, "mlperf_log_summary.txt").read_text(encoding="utf-8")


def _found(summary: str, pattern: str) -> float:
    found = re.search(pattern, summary)
    if found is None:
        raise SystemExit(f"the load generator's summary has no {pattern}:\n{summary}")
    return float(found[1])


if __name__ == "__main__":
    main()
