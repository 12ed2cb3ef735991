"""What the server counts and times, for Prometheus and for the protocol's statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repmlp_deploy.errors import optional_imports
from repmlp_deploy.runtime.batching import Execution

with optional_imports():
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE", "Metrics", "ModelMetrics", "Quantiles"]

CONTENT_TYPE = CONTENT_TYPE_LATEST

OUTCOMES = ("ok", "bad", "overloaded", "late", "cancelled", "unavailable", "failed")
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_NANOSECONDS = 1e9


@dataclass(frozen=True)
class Quantiles:
    """Latency of the answered requests, in seconds: the upper edge of the bucket that holds the quantile."""

    requests: int
    median: float | None
    p99: float | None


class Metrics:
    """All metrics of a server. Every model has its own labels, and only known models have any."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry, model = self.registry, ["model"]
        self.requests = Counter("repmlp_requests", "Requests by outcome.", [*model, "outcome"], registry=registry)
        self.seconds = Histogram(
            "repmlp_request_seconds",
            "From a request's arrival to its answer.",
            model,
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue = Histogram("repmlp_queue_seconds", "In the queue.", model, buckets=_SECONDS, registry=registry)
        self.compute = Histogram(
            "repmlp_compute_seconds", "Of one execution.", model, buckets=_SECONDS, registry=registry
        )
        self.shared = Counter(
            "repmlp_shared_compute_seconds", "Of executions, for each request in them.", model, registry=registry
        )
        self.preprocess = Histogram(
            "repmlp_preprocess_seconds", "Decoding and preprocessing of a request's images.", model,
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.samples = Histogram(
            "repmlp_batch_samples", "Samples of one execution.", model, buckets=_SAMPLES, registry=registry
        )
        self.failures = Counter(
            "repmlp_execution_failures", "Executions that the runtime failed.", model, registry=registry
        )
        self.waiting = Gauge("repmlp_queue_samples", "Samples that wait.", model, registry=registry)
        self.ready = Gauge(
            "repmlp_model_ready", "1 if the model has passed its check and answers.", model, registry=registry
        )
        self.margin = Gauge(
            "repmlp_self_check_margin",
            "How often the largest error fits into what is allowed.",
            model,
            registry=registry,
        )
        self.loads = Counter("repmlp_loads", "Bundles loaded, by outcome.", [*model, "outcome"], registry=registry)

        self.by_model = (
            self.seconds, self.queue, self.compute, self.shared, self.preprocess, self.samples, self.failures,
            self.waiting, self.ready, self.margin,
        )  # fmt: skip

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The metrics of one model."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self.outcomes = {outcome: metrics.requests.labels(model, outcome) for outcome in OUTCOMES}
        self.loads = {outcome: metrics.loads.labels(model, outcome) for outcome in ("ok", "refused")}
        self.seconds, self.queue = metrics.seconds.labels(model), metrics.queue.labels(model)
        self.compute, self.preprocess = metrics.compute.labels(model), metrics.preprocess.labels(model)
        self.shared = metrics.shared.labels(model)
        self.samples, self.failures = metrics.samples.labels(model), metrics.failures.labels(model)
        self.waiting, self.ready = metrics.waiting.labels(model), metrics.ready.labels(model)
        self.margin = metrics.margin.labels(model)

    def forget(self) -> None:
        """Take the model out of the metrics: it is served no more."""
        for outcome in self.outcomes:
            self._metrics.requests.remove(self._model, outcome)
        for outcome in self.loads:
            self._metrics.loads.remove(self._model, outcome)
        for metric in self._metrics.by_model:
            metric.remove(self._model)

    def observe(self, execution: Execution) -> None:
        """Count one execution."""
        self.samples.observe(execution.samples)
        self.compute.observe(execution.seconds)
        self.shared.inc(execution.seconds * len(execution.waits))
        for wait in execution.waits:
            self.queue.observe(wait)
        if execution.error is not None:
            self.failures.inc()

    def quantiles(self) -> Quantiles:
        """Return the latency of the requests that were answered."""
        counts = [(edge, self._value("repmlp_request_seconds_bucket", le=_edge(edge))) for edge in _SECONDS]
        total = self._value("repmlp_request_seconds_count")
        if not total:
            return Quantiles(0, None, None)
        median, p99 = (next((edge for edge, n in counts if n >= q * total), None) for q in (0.5, 0.99))
        return Quantiles(int(total), median, p99)

    def statistics(self) -> dict[str, Any]:
        """Return the protocol's statistics: counts, and sums in nanoseconds.

        As in Triton, the parts of computing are counted by request, and each has the whole time of its execution.
        perf_analyzer ends with an error where their counts differ.
        """
        outcome = {name: self._value("repmlp_requests_total", outcome=name) for name in OUTCOMES}
        executions, samples = (self._value(f"repmlp_batch_samples_{what}") for what in ("count", "sum"))
        success, computed = self._timed("request", outcome["ok"]), self._value("repmlp_queue_seconds_count")
        failed = sum(outcome.values()) - outcome["ok"]
        return {
            "inference_count": int(samples),
            "execution_count": int(executions),
            "inference_stats": {
                "success": success,
                "fail": {"count": int(failed), "ns": 0},
                "queue": self._timed("queue"),
                "compute_input": self._timed("preprocess", computed),
                "compute_infer": {
                    "count": int(computed),
                    "ns": int(self._value("repmlp_shared_compute_seconds_total") * _NANOSECONDS),
                },
                "compute_output": {"count": int(computed), "ns": 0},
                "cache_hit": {"count": 0, "ns": 0},
                "cache_miss": {"count": 0, "ns": 0},
            },
        }

    def _timed(self, what: str, count: float | None = None) -> dict[str, int]:
        seconds = self._value(f"repmlp_{what}_seconds_sum")
        counted = self._value(f"repmlp_{what}_seconds_count") if count is None else count
        return {"count": int(counted), "ns": int(seconds * _NANOSECONDS)}

    def _value(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(name, {"model": self._model, **labels}) or 0.0


def _edge(edge: float) -> str:
    return str(float(edge))
