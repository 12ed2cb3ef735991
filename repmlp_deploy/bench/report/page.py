"""The page: a report as one HTML file that needs no network."""

from __future__ import annotations

from importlib.resources import files

from repmlp_deploy.bench.measure.results import Report, Row
from repmlp_deploy.bench.report.plots import report_plots
from repmlp_deploy.bench.report.tables import conventions, facts, tables, times
from repmlp_deploy.errors import MissingDependency

try:
    import jinja2
    from markupsafe import Markup
except ImportError as missing:
    raise MissingDependency(missing.name or "jinja2", "bench") from None

__all__ = ["headlines", "to_html"]


def to_html(report: Report) -> str:
    """Return the page's text."""
    source = files("repmlp_deploy.bench.report").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(source).render(
        report=report,
        headlines=headlines(report),
        tables=tables(report),
        plots=[(plot.caption, Markup(plot.svg)) for plot in report_plots(report)],  # noqa: S704 - our own SVG
        facts=facts(report),
        conventions=conventions(report),
    )


def headlines(report: Report) -> list[str]:
    """Return one sentence per model and batch: the fastest row, how sure that is, and what it costs in accuracy."""
    lines = []
    for model, batch in dict.fromkeys((row.model, row.batch) for row in report.rows):
        rows = [r for r in report.rows if (r.model, r.batch, r.mode) == (model, batch, "steady") and r.summary]
        if rows:
            base = next((row.name for row in rows if row.ratio is None), report.baseline)
            lines.append(_headline(base, min(rows, key=_median_ms)))
    return lines


def _median_ms(row: Row) -> float:
    return float("inf") if row.summary is None else row.summary.p50_ms


def _headline(base: str, best: Row) -> str:
    told = f"{best.model}, batch {best.batch}: {best.name} is fastest with {_median_ms(best):.3g} ms a call"
    ratio = best.ratio
    if ratio is not None and ratio.low is not None and ratio.high is not None:
        told += f", {times(ratio.value)} as fast as {base} (95 %: {times(ratio.low)} to {times(ratio.high)})"
    if best.error is not None:
        told += f"; its logits are within {best.error.max_abs:.1e} of the trained network's"
    return f"{told}."
