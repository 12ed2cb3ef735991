"""Timing: rounds, percentiles, and how sure a ratio is.

**Rounds.** Formats take turns: every round gives each of them a slice of its time, in an order that rotates, so that
whatever drifts, such as temperature, frequency or a neighbour on the machine, hits all alike. Every call is kept;
nothing is clipped.

**Ratios.** Within a round, the baseline's median latency over the row's own: what drifts from round to round cancels.
A row's ratio is the median over the rounds, its interval a percentile bootstrap that resamples whole rounds, because
calls within a round share the drift and are not independent. Two runs have no rounds in common: their ratio is that of
the medians of all calls, and each run's rounds are resampled for themselves.
With fewer than six rounds a bootstrap is too sure of itself; the interval is then widened to hold every single
round's ratio, which covers the median with probability 1 − 2^(1−k) for k rounds. A ratio whose interval holds 1 is
not distinguishable from the baseline.

**Percentiles** are given only where enough calls support them: one in a hundred calls for p99 means at least a hundred.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

__all__ = ["Ratio", "Rounds", "Summary", "Warmup", "compare_rounds", "summarize", "time_calls", "warm_up"]

Rounds = tuple[tuple[float, ...], ...]
"""Latencies in milliseconds, a tuple of calls a round."""

RESAMPLES = 2000
CONFIDENCE = 0.95
FEW_ROUNDS = 6
STEADY_WINDOW, STEADY_SPREAD = 3, 0.05

_CHUNK = 1 << 21  # elements worked on at a time


class Summary(BaseModel):
    """A distribution of latencies; percentiles that too few calls support are None.

    Attributes:
        calls: how many.
        p50_ms, p90_ms, p95_ms, p99_ms: percentiles.
        min_ms, max_ms, mean_ms: extremes and mean of all calls.
        images_per_s: images over the sum of all latencies.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    calls: int
    p50_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    min_ms: float
    max_ms: float
    mean_ms: float
    images_per_s: float


class Ratio(BaseModel):
    """How many times as fast as the baseline, with the interval that holds it at 95 %.

    Attributes:
        value: latency of the baseline over this row's, the median over the rounds.
        low, high: the interval; None where there are too few rounds for one.
        verdict: what may be said.
        rounds: how many rounds the two have in common.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float | None
    high: float | None
    verdict: Literal["faster", "slower", "not distinguishable", "too few rounds"]
    rounds: int


class Warmup(BaseModel):
    """What ran before the first call that counts.

    Attributes:
        calls: how many, the first inference among them.
        seconds: how long.
        steady: whether the last calls were level; otherwise the warm-up's time was up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    calls: int
    seconds: float
    steady: bool


def time_calls(call: Callable[[], object], seconds: float, *, gap_ms: float = 0.0, least: int = 1) -> list[float]:
    """Return the latencies of calls, in milliseconds, until `seconds` are over and at least `least` were made.

    Args:
        call: what is timed.
        seconds: of calls and gaps together.
        gap_ms: sleep before every call, as between requests that arrive now and then.
        least: number of calls, whatever they take.
    """
    latencies: list[float] = []
    ends = time.perf_counter() + seconds
    while len(latencies) < least or time.perf_counter() < ends:
        if gap_ms:
            time.sleep(gap_ms / 1e3)
        started = time.perf_counter_ns()
        call()
        latencies.append((time.perf_counter_ns() - started) / 1e6)
    return latencies


def warm_up(call: Callable[[], object], seconds: float, *, gap_ms: float = 0.0) -> Warmup:
    """Call until two windows of calls in a row have medians within a twentieth, or `seconds` are over."""
    started = time.perf_counter()
    latencies: list[float] = []
    while time.perf_counter() - started < seconds:
        latencies += time_calls(call, 0.0, gap_ms=gap_ms)
        if _is_steady(latencies):
            break
    return Warmup(calls=len(latencies), seconds=time.perf_counter() - started, steady=_is_steady(latencies))


def _is_steady(latencies: Sequence[float]) -> bool:
    if len(latencies) < 2 * STEADY_WINDOW:
        return False
    before = float(np.median(latencies[-2 * STEADY_WINDOW : -STEADY_WINDOW]))
    last = float(np.median(latencies[-STEADY_WINDOW:]))
    return abs(before - last) <= STEADY_SPREAD * last


def summarize(rounds: Rounds, batch: int) -> Summary:
    """Return the distribution of every call of every round.

    Raises:
        ValueError: there are no calls.
    """
    latencies = np.array([ms for calls in rounds for ms in calls])
    if not len(latencies):
        raise ValueError("no call was timed")
    tails = {f"p{q}_ms": _percentile(latencies, q) for q in (90, 95, 99)}
    return Summary(
        calls=len(latencies),
        p50_ms=float(np.median(latencies)),
        **tails,
        min_ms=float(latencies.min()),
        max_ms=float(latencies.max()),
        mean_ms=float(latencies.mean()),
        images_per_s=float(1e3 * batch * len(latencies) / latencies.sum()),
    )


def _percentile(latencies: NDArray[np.float64], q: int) -> float | None:
    """Return the q-th percentile, or None if fewer than one call lies beyond it."""
    return float(np.percentile(latencies, q)) if len(latencies) * (100 - q) >= 100 else None  # noqa: PLR2004 - percent


def compare_rounds(baseline: Rounds, own: Rounds, *, paired: bool = True, seed: int = 0) -> Ratio:
    """Return how many times as fast as the baseline a row is, from the rounds that both have.

    Args:
        baseline: latencies of the baseline.
        own: latencies of the row.
        paired: whether round i of both ran side by side; otherwise they are resampled independently.
        seed: of the bootstrap.
    """
    if paired:
        both = [(b, o) for b, o in zip(baseline, own, strict=False) if b and o]
        base, mine = [np.array(b) for b, _ in both], [np.array(o) for _, o in both]
        singles = [float(np.median(b) / np.median(o)) for b, o in both]
    else:
        base, mine = [np.array(calls) for calls in baseline if calls], [np.array(calls) for calls in own if calls]
        singles = [float(np.median(b) / np.median(o)) for b in base for o in mine]
    rounds = min(len(base), len(mine))
    if not rounds:
        raise ValueError("the two rows have no round in common")
    value = float(np.median(singles) if paired else np.median(np.concatenate(base)) / np.median(np.concatenate(mine)))
    if rounds < 2:  # noqa: PLR2004 - one round has no spread
        return Ratio(value=value, low=None, high=None, verdict="too few rounds", rounds=rounds)
    rng = np.random.default_rng(seed)
    first = rng.integers(0, len(base), (RESAMPLES, len(base)))
    if paired:
        ratios = np.median(np.array(singles)[first], axis=1)
    else:
        second = rng.integers(0, len(mine), (RESAMPLES, len(mine)))
        ratios = _pooled_medians(base, first) / _pooled_medians(mine, second)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(edge) for edge in np.percentile(ratios, [tail, 100 - tail]))
    if rounds < FEW_ROUNDS:
        low, high = min(low, *singles), max(high, *singles)
    return Ratio(value=value, low=low, high=high, verdict=_verdict(low, high), rounds=rounds)


def _verdict(low: float, high: float) -> Literal["faster", "slower", "not distinguishable"]:
    return "faster" if low > 1 else "slower" if high < 1 else "not distinguishable"


def _pooled_medians(rounds: Sequence[NDArray[np.float64]], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the median of the calls of every choice of rounds: (resamples, rounds) indices -> (resamples,).

    Calls are sorted once; a choice weighs each by how often its round was drawn, and its median is where half of the
    weight is reached.
    """
    calls = np.concatenate(rounds)
    order = np.argsort(calls)
    calls, owner = calls[order], np.repeat(np.arange(len(rounds)), [len(r) for r in rounds])[order]
    drawn = np.stack([np.count_nonzero(chosen == i, axis=1) for i in range(len(rounds))], axis=1)
    medians = np.empty(len(chosen))
    step = max(1, _CHUNK // len(calls))
    for start in range(0, len(chosen), step):
        reached = np.cumsum(drawn[start : start + step, owner], axis=1)  # (step, calls)
        half = reached[:, -1:] / 2
        low, high = np.argmax(reached >= half, axis=1), np.argmax(reached > half, axis=1)
        medians[start : start + step] = (calls[low] + calls[high]) / 2
    return medians
