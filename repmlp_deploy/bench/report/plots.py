"""Figures of a report, as SVG text that needs no file, font or script beside it.

Colours are Okabe and Ito's, told apart by readers of any colour vision. Each row also has a marker, and
no two rows have both in common.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repmlp_deploy.bench.measure.results import Report, Row
from repmlp_deploy.bench.report.tables import groups
from repmlp_deploy.errors import MissingDependency

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
except ImportError:
    raise MissingDependency("matplotlib", "bench") from None

__all__ = ["Plot", "look_of", "report_plots"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C7A00", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
WIDTH_INCHES = 6.0

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Plot:
    """A figure: what it shows in a sentence, and the SVG."""

    caption: str
    svg: str


Look = Mapping[str, tuple[str, str]]


def look_of(i: int) -> tuple[str, str]:
    """Return colour and marker of the `i`-th row; when the colours come again, each has the next marker."""
    return COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]


def report_plots(report: Report) -> list[Plot]:
    """Draw latency distributions, throughput over batch, rooflines, and speed against error."""
    names = list(dict.fromkeys(row.name for row in report.rows))
    look = {name: look_of(i) for i, name in enumerate(names)}
    plots: list[tuple[str, Figure]] = []
    with mpl.rc_context(_STYLE):
        for title, rows in groups(report):
            measured = [row for row in rows if row.summary is not None]
            if measured:
                caption = f"Latency: {title}. Line: every call; bar: the middle half; mark: the median."
                plots.append((caption, _latencies(measured, look)))
        for model in dict.fromkeys(row.model for row in report.rows):
            steady = [r for r in report.rows if r.model == model and r.mode == "steady" and r.summary is not None]
            if len({row.batch for row in steady}) > 1:
                plots.append((f"Throughput over batch: {model}.", _throughput(steady, look)))
            if any(row.roofline for row in steady) and report.machine is not None:
                plots.append(
                    (f"Roofline: {model}. Larger markers are larger batches.", _roofline(report, steady, look))
                )
            for batch in dict.fromkeys(row.batch for row in steady):
                chosen = [row for row in steady if row.batch == batch and row.error is not None]
                if chosen:
                    plots.append((f"Speed against error: {model}, batch {batch}.", _errors(chosen, look)))
        return [Plot(caption, _svg(figure, f"p{i}")) for i, (caption, figure) in enumerate(plots)]


def _latencies(rows: Sequence[Row], look: Look) -> Figure:
    figure, axes = _figure(1.1 + 0.42 * len(rows))
    for i, row in enumerate(reversed(rows)):
        calls = np.array([ms for calls in row.rounds for ms in calls])
        low, q1, mid, q3, high = np.percentile(calls, [0, 25, 50, 75, 100])
        colour, marker = look[row.name]
        axes.plot([low, high], [i, i], color=colour, linewidth=1.5, solid_capstyle="butt")
        axes.plot([q1, q3], [i, i], color=colour, linewidth=9, alpha=0.35, solid_capstyle="butt")
        axes.plot([mid], [i], color=colour, marker=marker, markersize=7, linestyle="none")
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    _log_axis(axes.xaxis, axes, "x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("latency (ms, log scale)")
    return figure


def _throughput(rows: Sequence[Row], look: Look) -> Figure:
    figure, axes = _figure(4.4)
    for name in dict.fromkeys(row.name for row in rows):
        points = sorted((r.batch, r.summary.images_per_s) for r in rows if r.name == name and r.summary is not None)
        colour, marker = look[name]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name, linewidth=1.8)
    batches = sorted({row.batch for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    _log_axis(axes.yaxis, axes, "y")
    axes.set_xlabel("batch (images a call)")
    axes.set_ylabel("throughput (images/s, log scale)")
    _legend(figure, axes)
    return figure


def _roofline(report: Report, rows: Sequence[Row], look: Look) -> Figure:
    figure, axes = _figure(4.6)
    machine = report.machine
    if machine is None:
        raise AssertionError("called with a machine only")
    placed = [(row, row.roofline) for row in rows if row.roofline is not None]
    edges = [roof.intensity for _, roof in placed]
    edges += [peak / machine.bandwidth_gb_s for peak in machine.peak_gflops.values()]
    x = np.geomspace(min(edges) / 3, max(edges) * 4, 200)
    used = [p for p in machine.peak_gflops if any(row.precision == p for row, _ in placed)]
    for i, precision in enumerate(used):
        peak = machine.peak_gflops[precision]
        style = ("-", "--", ":", "-.")[i % 4]
        y = np.minimum(peak, x * machine.bandwidth_gb_s)
        axes.plot(x, y, color="#333333", linestyle=style, linewidth=1.3, label=f"roof {precision}: {peak:.0f} GFLOP/s")
    batches = sorted({row.batch for row, _ in placed})
    labelled: set[str] = set()
    for row, roof in placed:
        colour, marker = look[row.name]
        label = None if row.name in labelled else row.name
        labelled.add(row.name)
        size = 6.0 + 2.5 * batches.index(row.batch)
        axes.plot([roof.intensity], [roof.gflops], color=colour, marker=marker, markersize=size, label=label, ls="none")
    _log_axis(axes.xaxis, axes, "x")
    _log_axis(axes.yaxis, axes, "y")
    axes.set_xlabel("arithmetic intensity (FLOP per byte of least traffic)")
    axes.set_ylabel("GFLOP/s")
    _legend(figure, axes)
    return figure


def _errors(rows: Sequence[Row], look: Look) -> Figure:
    figure, axes = _figure(4.2)
    for row in rows:
        if row.summary is None or row.error is None:
            continue
        colour, marker = look[row.name]
        error = max(row.error.max_abs, 1e-12)
        axes.plot([row.summary.p50_ms], [error], color=colour, marker=marker, markersize=9, label=row.name, ls="none")
    _log_axis(axes.xaxis, axes, "x")
    axes.set_yscale("log")
    axes.set_xlabel("median latency (ms, log scale): left is faster")
    axes.set_ylabel("largest error of a logit")
    _legend(figure, axes)
    return figure


def _figure(height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    return figure, figure.subplots()


def _log_axis(axis: Axis, axes: Axes, which: str) -> None:
    """Set a log scale with plain numbers at 1, 2 and 5, or at 1 alone if many decades would crowd."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)))  # noqa: PLR2004 - what fits
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)


def _svg(figure: Figure, prefix: str) -> str:
    """Return the SVG element, with ids that are unique on a page with several."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    return re.sub(r"url\(#", f"url(#{prefix}-", text)
