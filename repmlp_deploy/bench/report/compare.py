"""Comparison of two runs: what got faster or slower, beyond noise and beyond a threshold.

Absolute times of two runs differ for reasons that are nobody's fault: another day, a busy neighbour. Batch sizes feel
them differently, a neighbour in the caches most of all the smallest. What hits every row of a model, batch size and
mode alike is taken out as the group's *drift*, the median over its rows of new over old median latency, where three
rows at least are in both runs. A row has changed when its ratio, drift taken out, is beyond the threshold and the 95 %
interval of the ratio, resampled over the rounds of each run, leaves out 1. Drift itself is a change when every group's
is beyond twice the threshold and neither the machine's own matrix products nor its memory became slower by as much:
several runtimes that slow down together point to the machine.

Load scenarios have one run per figure, and so no interval: those that differ by more than the threshold are notes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from repmlp_deploy.bench.measure.results import Report, Row
from repmlp_deploy.bench.measure.timing import compare_rounds
from repmlp_deploy.bench.report.tables import Table

__all__ = ["Change", "Comparison", "compare_reports", "comparison_table"]

THRESHOLD = 0.1
"""Two runs of the same program on a shared machine differ by up to this much, whatever their intervals say."""

_ROWS_FOR_DRIFT = 3

Group = tuple[str, int, str]
"""Model, batch size and mode: rows that take turns."""


@dataclass(frozen=True)
class Change:
    """One row in two runs.

    Attributes:
        row: in the new run.
        old_ms: median latency in the old run.
        new_ms: and in the new one.
        drift: new over old, of all rows of its group alike.
        ratio: new over old, drift taken out: 1.15 is 15 % slower.
        low, high: its 95 % interval; None where there are too few rounds for one.
        verdict: beyond noise and threshold.
    """

    row: Row
    old_ms: float
    new_ms: float
    drift: float
    ratio: float
    low: float | None
    high: float | None
    verdict: Literal["faster", "slower", "within noise"]


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        changes: one per row that both measured.
        notes: what a reader must know: rows in one run only, other machines or versions.
        drift: new over old that all groups share: the smallest of theirs.
        drifted: whether that is a slowdown which the machine does not explain.
    """

    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    drift: float
    drifted: bool

    @property
    def slower(self) -> list[Change]:
        """The rows that got slower."""
        return [change for change in self.changes if change.verdict == "slower"]


def compare_reports(old: Report, new: Report, threshold: float = THRESHOLD) -> Comparison:
    """Compare one run with another.

    Args:
        old: the earlier run.
        new: the later run.
        threshold: smallest relative change of latency that counts; 0.1 is 10 %.
    """
    earlier = {row.key: row for row in old.rows if row.summary is not None}
    later = {row.key: row for row in new.rows if row.summary is not None}
    both = [key for key in later if key in earlier]
    drifts = _drifts(earlier, later, both)
    changes = tuple(_change(earlier[key], later[key], drifts[_group(later[key])], threshold) for key in both)
    notes = _differences(old, new)
    missing = [key for key in earlier if key not in later]
    notes += [f"measured before, not now: {_name(key)}: {_why(new, key)}" for key in missing]
    notes += [f"measured now, not before: {_name(key)}" for key in later if key not in earlier]
    notes += _scenario_notes(old, new, threshold)
    drift = min(drifts.values(), default=1.0)
    unexplained = drift > (1 + 2 * threshold) * max(1.0, _machine_slowdown(old, new))
    return Comparison(changes, tuple(notes), drift, unexplained)


def _group(row: Row) -> Group:
    return row.model, row.batch, row.mode


def _drifts(earlier: Mapping[Any, Row], later: Mapping[Any, Row], both: Sequence[Any]) -> dict[Group, float]:
    """Return new over old of every group, 1 if too few rows tell it."""
    ratios: dict[Group, list[float]] = {}
    for key in both:
        old, new = earlier[key].summary, later[key].summary
        if old is not None and new is not None:
            ratios.setdefault(_group(later[key]), []).append(new.p50_ms / old.p50_ms)
    return {group: median(found) if len(found) >= _ROWS_FOR_DRIFT else 1.0 for group, found in ratios.items()}


def comparison_table(comparison: Comparison) -> Table:
    """Return the changes as a table for people."""
    columns = (
        *("model", "format", "precision", "batch", "mode", "before ms", "now ms"),
        *("all rows", "change", "interval", "verdict"),
    )
    rows = tuple(
        (
            *(c.row.model, c.row.format, c.row.precision, str(c.row.batch), c.row.mode),
            *(f"{c.old_ms:.3f}", f"{c.new_ms:.3f}", f"{100 * (c.drift - 1):+.1f} %", f"{100 * (c.ratio - 1):+.1f} %"),
            "" if c.low is None or c.high is None else f"{100 * (c.low - 1):+.1f} to {100 * (c.high - 1):+.1f} %",
            c.verdict,
        )
        for c in comparison.changes
    )
    return Table("against the earlier run; what all rows of a batch size share is taken out", columns, rows, left=5)


def _change(old: Row, new: Row, drift: float, threshold: float) -> Change:
    # compare_rounds says how many times as fast the second is; with new first that is new over old
    found = compare_rounds(new.rounds, old.rounds, paired=False)
    low, high = (None if edge is None else edge / drift for edge in (found.low, found.high))
    ratio = found.value / drift
    verdict: Literal["faster", "slower", "within noise"] = "within noise"
    if low is not None and high is not None:
        # noise must not explain it, and the change itself must matter
        if low > 1 and ratio > 1 + threshold:
            verdict = "slower"
        elif high < 1 and ratio < 1 - threshold:
            verdict = "faster"
    if old.summary is None or new.summary is None:
        raise AssertionError("only measured rows are compared")
    return Change(new, old.summary.p50_ms, new.summary.p50_ms, drift, ratio, low, high, verdict)


def _machine_slowdown(old: Report, new: Report) -> float:
    """Return how much slower the machine's fp32 products or memory became, the larger factor; 1 if unknown."""
    if old.machine is None or new.machine is None:
        return 1.0
    before, now = (report.machine.peak_gflops.get("fp32", 0.0) for report in (old, new) if report.machine)
    products = before / now if before and now else 1.0
    return max(products, old.machine.bandwidth_gb_s / new.machine.bandwidth_gb_s)


def _differences(old: Report, new: Report) -> list[str]:
    """Return what only one of the two runs has."""
    pairs = [(key, old.environment.get(key), new.environment.get(key)) for key in ("cpu", "gpu", "python")]
    pairs.append(("threads", old.settings.get("threads"), new.settings.get("threads")))
    before, now = old.environment.get("versions", {}), new.environment.get("versions", {})
    pairs += [(name, before.get(name), now.get(name)) for name in {**before, **now}]
    pairs += [(f"weights of {model}", text, new.weights.get(model, text)) for model, text in old.weights.items()]
    return [f"{what} was {was}, is {is_}" for what, was, is_ in pairs if was != is_]


def _scenario_notes(old: Report, new: Report, threshold: float) -> list[str]:
    """Return the scenarios whose figures differ, or that only one run has."""
    before = {row.key: row for row in old.scenarios if row.figure is not None}
    now = {row.key: row for row in new.scenarios if row.figure is not None}
    notes = []
    for key in {**before, **now}:
        was, is_ = (found[key].figure if key in found else None for found in (before, now))
        model, name, precision, scenario, source, way = key
        what = f"{model} {name} {precision}, {scenario} from {source}, {way}"
        unit = "ms" if scenario == "single-stream" else "samples/s"
        if was is None or is_ is None:
            notes.append(f"{'measured now, not before' if was is None else 'measured before, not now'}: {what}")
        elif abs(is_ - was) > threshold * was:
            notes.append(f"{what}: was {was:.4g}, is {is_:.4g} {unit}; not judged, as one run has no interval")
    return notes


def _name(key: tuple[str, str, str, int, str]) -> str:
    model, name, precision, batch, mode = key
    return f"{model} {name} {precision}, batch {batch}, {mode}"


def _why(report: Report, key: tuple[str, str, str, int, str]) -> str:
    return next((row.reason or row.status for row in report.rows if row.key == key), "not asked for")
