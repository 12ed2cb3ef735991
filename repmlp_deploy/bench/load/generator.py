"""MLCommons' load generator: it decides when samples arrive, and measures how long each takes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from repmlp_deploy.bench.load.ways import Plan
from repmlp_deploy.bench.measure.results import LoadRun
from repmlp_deploy.errors import MissingDependency, RepMLPError

try:
    import mlperf_loadgen as loadgen
except ImportError:
    raise MissingDependency("mlperf_loadgen", "bench") from None

__all__ = ["complete", "generate_load"]

_MILLION = 1_000_000
_LEAST_QUERIES = 32  # of SingleStream: its figure is the 90th percentile
_LEAST_ARRIVALS = 100  # of Server: its figure is the 99th
_LONGEST = 4  # times the planned duration, of Server: then no more arrive; what has arrived is answered, however late

_KINDS = {
    "single-stream": loadgen.TestScenario.SingleStream,
    "offline": loadgen.TestScenario.Offline,
    "server": loadgen.TestScenario.Server,
}
_RATES = {
    "single-stream": r"QPS w/o loadgen overhead\s*: ([\d.e+]+)",
    "offline": r"Samples per second: ([\d.e+]+)",
    "server": r"Completed samples per second\s*: ([\d.e+]+)",
}
"""Scenario to where the summary says the samples per second."""


def complete(query: int) -> None:
    """Tell the load generator that a sample is answered."""
    loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query, 0, 0)])


def generate_load(issue: Callable[[Sequence[Any]], None], plan: Plan) -> LoadRun:
    """Let samples arrive, wait for every answer, and return what the load generator measured.

    Args:
        issue: begins samples with an `id` and an `index`; `complete` is called with the id of each later.
        plan: which samples arrive, and when.
    """
    with tempfile.TemporaryDirectory(prefix="repmlp-load-") as folder:
        logs = loadgen.LogSettings()
        logs.log_output.outdir, logs.log_output.copy_summary_to_stdout = folder, False
        logs.enable_trace = False
        under_test = loadgen.ConstructSUT(issue, lambda: None)
        library = loadgen.ConstructQSL(plan.samples, plan.samples, lambda _: None, lambda _: None)
        try:
            loadgen.StartTestWithLogSettings(under_test, library, _settings(plan), logs)
        finally:
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(under_test)
        return _read(Path(folder, "mlperf_log_summary.txt").read_text(encoding="utf-8"), plan)


def _settings(plan: Plan) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario, settings.mode = _KINDS[plan.scenario], loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = max(1, int(1000 * plan.seconds))
    expected = int(plan.rate * plan.seconds)
    if plan.scenario == "single-stream":
        settings.min_query_count = _LEAST_QUERIES
    elif plan.scenario == "offline":
        settings.offline_expected_qps = plan.rate
        settings.min_query_count = max(plan.samples, expected)
    else:
        settings.server_target_qps, settings.server_target_latency_percentile = plan.rate, 0.99
        settings.max_duration_ms = _LONGEST * settings.min_duration_ms
        settings.server_target_latency_ns = int(_MILLION * plan.limit_ms)
        settings.min_query_count = max(_LEAST_ARRIVALS, expected)
    return settings


def _read(summary: str, plan: Plan) -> LoadRun:
    """Read the load generator's summary."""
    detail = re.findall(r"(\d+\.\d+) percentile latency \(ns\)\s*: (\d+)", summary)
    latencies = {float(share): int(ns) / _MILLION for share, ns in detail}
    return LoadRun(
        asked_per_s=plan.rate if plan.scenario == "server" else None,
        samples_per_s=float(_found(summary, _RATES[plan.scenario])),
        p50_ms=latencies[50.0],
        p90_ms=latencies[90.0],
        p99_ms=latencies[99.0],
        valid=_found(summary, r"Result is : (\w+)") == "VALID",
    )


def _found(summary: str, pattern: str) -> str:
    found = re.search(pattern, summary)
    if found is None:
        said = " ".join(summary.split())[:200]
        raise RepMLPError(f"the load generator's summary has no {pattern!r}, but: {said}")
    return found[1]
