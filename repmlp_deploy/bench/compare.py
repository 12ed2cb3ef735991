"""Comparison of two runs: what got faster or slower, beyond noise and beyond a threshold.

Absolute times of two runs differ for reasons that are nobody's fault: another day, a busy neighbour. What hits every
row alike is taken out as the *drift*, the median over rows of new over old median latency, where at least three rows
are in both runs. A row has changed when its ratio, drift taken out, is beyond the threshold and the 95 % interval of
the ratio, resampled over the rounds of each run, leaves out 1. The drift itself is a change when it is beyond the
threshold and the machine's own matrix-product peak did not move by as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal

from repmlp_deploy.bench.report import Table
from repmlp_deploy.bench.results import Report, Row
from repmlp_deploy.bench.timing import compare_rounds

__all__ = ["Change", "Comparison", "compare_reports", "comparison_table"]

THRESHOLD = 0.05

_ROWS_FOR_DRIFT = 3


@dataclass(frozen=True)
class Change:
    """One row in two runs.

    Attributes:
        row: in the new run.
        old_ms: median latency in the old run.
        new_ms: and in the new one.
        ratio: new over old, drift taken out: 1.15 is 15 % slower.
        low, high: its 95 % interval; None where there are too few rounds for one.
        verdict: beyond noise and threshold.
    """

    row: Row
    old_ms: float
    new_ms: float
    ratio: float
    low: float | None
    high: float | None
    verdict: Literal["faster", "slower", "within noise"]


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        changes: one a row that both measured.
        drift: new over old, of all rows alike.
        notes: what a reader must know: rows in one run only, other machines or versions.
        drifted: whether the drift itself is a slowdown that the machine's peak does not explain.
    """

    changes: tuple[Change, ...]
    drift: float
    notes: tuple[str, ...]
    drifted: bool

    @property
    def slower(self) -> list[Change]:
        """The rows that got slower."""
        return [change for change in self.changes if change.verdict == "slower"]


def compare_reports(old: Report, new: Report, threshold: float = THRESHOLD) -> Comparison:
    """What changed from one run to another.

    Args:
        old: the earlier run.
        new: the later run.
        threshold: smallest relative change of latency that counts; 0.05 is 5 %.
    """
    earlier = {row.key: row for row in old.rows if row.summary is not None}
    later = {row.key: row for row in new.rows if row.summary is not None}
    both = [key for key in later if key in earlier]
    ratios = [later[key].summary.p50_ms / earlier[key].summary.p50_ms for key in both]  # type: ignore[union-attr]
    drift = median(ratios) if len(ratios) >= _ROWS_FOR_DRIFT else 1.0
    changes = tuple(_change(earlier[key], later[key], drift, threshold) for key in both)
    notes = _differences(old, new)
    missing = [key for key in earlier if key not in later]
    notes += [f"measured before, not now: {_name(key)}: {_why(new, key)}" for key in missing]
    notes += [f"measured now, not before: {_name(key)}" for key in later if key not in earlier]
    explained = _machine_slowdown(old, new)
    return Comparison(
        changes, drift, tuple(notes), drifted=drift > 1 + threshold and drift > explained * (1 + threshold)
    )


def comparison_table(comparison: Comparison) -> Table:
    """The changes for people."""
    columns = ("model", "format", "precision", "batch", "mode", "before ms", "now ms", "change", "interval", "verdict")
    rows = tuple(
        (
            *(c.row.model, c.row.format, c.row.precision, str(c.row.batch), c.row.mode),
            *(f"{c.old_ms:.3f}", f"{c.new_ms:.3f}", f"{100 * (c.ratio - 1):+.1f} %"),
            "" if c.low is None or c.high is None else f"{100 * (c.low - 1):+.1f} to {100 * (c.high - 1):+.1f} %",
            c.verdict,
        )
        for c in comparison.changes
    )
    title = f"against the earlier run; {100 * (comparison.drift - 1):+.1f} % that all rows share taken out"
    return Table(title, columns, rows, left=5)


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
    return Change(new, old.summary.p50_ms, new.summary.p50_ms, ratio, low, high, verdict)


def _machine_slowdown(old: Report, new: Report) -> float:
    """How many times the machine's fp32 matrix products became slower; 1 where it is not known."""
    if old.machine is None or new.machine is None:
        return 1.0
    before, now = (report.machine.peak_gflops.get("fp32", 0.0) for report in (old, new) if report.machine)
    return before / now if before and now else 1.0


def _differences(old: Report, new: Report) -> list[str]:
    """What the two runs did not have in common."""
    pairs = [(key, old.environment.get(key), new.environment.get(key)) for key in ("cpu", "gpu", "python")]
    pairs.append(("threads", old.settings.get("threads"), new.settings.get("threads")))
    before, now = old.environment.get("versions", {}), new.environment.get("versions", {})
    pairs += [(name, before.get(name), now.get(name)) for name in {**before, **now}]
    pairs += [(f"weights of {model}", text, new.weights.get(model, text)) for model, text in old.weights.items()]
    return [f"{what} was {was}, is {is_}" for what, was, is_ in pairs if was != is_]


def _name(key: tuple[str, str, str, int, str]) -> str:
    model, name, precision, batch, mode = key
    return f"{model} {name} {precision}, batch {batch}, {mode}"


def _why(report: Report, key: tuple[str, str, str, int, str]) -> str:
    return next((row.reason or row.status for row in report.rows if row.key == key), "not asked for")
