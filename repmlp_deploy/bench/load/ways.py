"""What is run under load: MLPerf's scenarios, where samples come from, and the ways to run what arrives.

| scenario | samples arrive | the figure |
|---|---|---|
| single-stream | one after the answer to the one before | 90th percentile of latency |
| offline | all at once | samples per second |
| server | by a Poisson process | highest rate whose 99th percentile of latency keeps a limit |

The highest rate is found by bisection between nothing and what offline reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from repmlp_deploy.bench.subjects.table import SUBJECTS

__all__ = ["SCENARIOS", "SOURCES", "STEPS", "WAYS", "Plan", "RateSearch", "Scenario", "Source", "Way", "why_no_way"]

Scenario = Literal["single-stream", "offline", "server"]
SCENARIOS: tuple[Scenario, ...] = ("single-stream", "offline", "server")

Source = Literal["tensors", "jpeg"]
SOURCES: Mapping[Source, str] = MappingProxyType({"tensors": "from tensors", "jpeg": "from JPEG bytes to classes"})
"""Where samples come from, in words."""

STEPS = 6  # of the bisection: the last is a 64th of what offline reached


@dataclass(frozen=True)
class Way:
    """A way to run what arrives.

    Attributes:
        title: for people.
        gathers: whether requests share batches, as in `repmlp-serve`.
        streams: whether several inferences run at a time, each on its share of the cores.
        targets: whether the server's limit is the target of `Queueing`, as with `repmlp-serve --target-ms`.
    """

    title: str
    gathers: bool
    streams: bool
    targets: bool = False


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "single": Way("one at a time", gathers=False, streams=False),
        "batched": Way("batched", gathers=True, streams=False),
        "targeted": Way("batched to the limit", gathers=True, streams=False, targets=True),
        "streams": Way("batched, streams", gathers=True, streams=True),
    }
)
"""Every way, the one that others are compared with first."""


def why_no_way(way: str, format_name: str, threads: int, device: str) -> str | None:
    """Return why a format cannot run in a way; None if it can."""
    if not WAYS[way].streams:
        return None
    if SUBJECTS[format_name].needs == "checkpoint":
        return "PyTorch has no streams here"
    if device != "cpu":
        return "streams are of CPUs"
    return "one thread cannot be shared" if threads == 1 else None


@dataclass(frozen=True)
class Plan:
    """One run of the load generator.

    Attributes:
        scenario: how samples arrive.
        seconds: of arrivals at least.
        samples: different ones there are.
        rate: samples per second: those that arrive in `server`, those that are expected in `offline`.
        limit_ms: of the 99th percentile of latency in `server`.
    """

    scenario: Scenario
    seconds: float
    samples: int = 0
    rate: float = 0.0
    limit_ms: float = 0.0


@dataclass
class RateSearch:
    """Bisection for the highest rate that keeps the limit.

    Attributes:
        high: a rate that is not expected to keep it.
        low: the highest that was seen to keep it.
        steps: rates that were tried.
    """

    high: float
    low: float = 0.0
    steps: int = 0

    @property
    def rate(self) -> float:
        """The rate to try next."""
        return (self.low + self.high) / 2

    @property
    def ended(self) -> bool:
        """Whether enough rates were tried."""
        return self.steps >= STEPS

    def tell(self, *, kept: bool) -> None:
        """Note whether `rate` kept the limit."""
        self.low, self.high = (self.rate, self.high) if kept else (self.low, self.rate)
        self.steps += 1
