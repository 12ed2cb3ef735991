"""Reports: one set of tables, for the terminal, Markdown and the page; and a CSV with one line per row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repmlp_deploy.bench.load.ways import SCENARIOS, SOURCES, WAYS
from repmlp_deploy.bench.measure.results import Report, Row, ScenarioRow

__all__ = ["Table", "conventions", "facts", "groups", "tables", "times", "to_csv", "to_markdown"]


_Key = tuple[str, str, str, str, str, str]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: one line.
        columns: headings.
        rows: cells.
        left: how many columns are text; the others are figures.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def tables(report: Report) -> list[Table]:
    """Return every table: latency by group, scenarios, what did not run, cold start with proof, counts, profile."""
    found = [
        _latency_table(report, title, rows)
        for title, rows in groups(report)
        if any(row.summary is not None for row in rows)
    ]
    found += _scenario_tables(report)
    if any(row.summary is None for row in report.rows) or any(row.figure is None for row in report.scenarios):
        found.append(_missing_table(report))
    found.append(_proof_table(report))
    if any(report.counts.values()):
        found.append(_counts_table(report))
    if report.profile:
        found.append(_profile_table(report))
    return found


def groups(report: Report) -> Iterator[tuple[str, list[Row]]]:
    """Return rows that are compared with one another, with a title: one group per model, batch and mode."""
    keys = dict.fromkeys((row.model, row.batch, row.mode) for row in report.rows)
    gap = report.settings.get("idle_ms")
    words = {
        "steady": "calls back to back",
        "idle": f"a gap of {gap:g} ms before every call" if gap else "a gap before every call",
        "end-to-end": "from JPEG bytes to classes",
    }
    for model, batch, mode in keys:
        rows = [row for row in report.rows if (row.model, row.batch, row.mode) == (model, batch, mode)]
        yield f"{model}, batch {batch}, {words[mode]}", rows


def facts(report: Report) -> list[str]:
    """Return the facts that the figures must be read with, one per line."""
    env, machine = report.environment, report.machine
    cores = f"{env.get('cores_physical')} cores, {report.settings.get('threads')} threads used"
    lines = [
        (
            f"machine: {env.get('cpu')} ({', '.join(env.get('cpu_flags', ()))}), {cores}, "
            f"{env.get('memory_bytes', 0) / 1e9:.0f} GB, governor {env.get('governor') or 'not readable'}, "
            f"GPU {env.get('gpu') or 'none'}, load {_load(env)} when it began"
        )
    ]
    if machine is not None:
        peaks = ", ".join(f"{p} {gflops:.0f} GFLOP/s" for p, gflops in machine.peak_gflops.items())
        lines.append(f"peaks, measured in this run: {peaks}; memory {machine.bandwidth_gb_s:.1f} GB/s")
    lines += [f"weights of {model}: {weights}" for model, weights in report.weights.items()]
    versions = ", ".join(f"{name} {version}" for name, version in env.get("versions", {}).items())
    lines.append(f"versions: {versions}; commit {env.get('commit') or 'none, an installed package'}")
    lines += [f"note: {note}" for note in report.notes]
    cut = [f"note: {row.model}, {row.scenario}: {row.reason}" for row in report.scenarios if row.run and row.reason]
    lines += dict.fromkeys(cut)
    if report.interrupted:
        lines.append("note: the run was interrupted; the figures are of what had been measured")
    return lines


def conventions(report: Report) -> list[str]:
    """Return what the columns mean."""
    said = [
        (
            f"vs base: latency of the base row ({report.baseline}, or the first that ran) over the row's, median over "
            "rounds, with its 95 % interval (bootstrap over rounds; it covers all rounds if there are fewer than six); "
            "≈ where the interval holds 1: not distinguishable."
        ),
        "Nothing is clipped. A percentile is left out where fewer than one call lies beyond it.",
        "error: largest absolute difference from the trained network in float64, on the probe's inputs.",
        "of roof: attained over the smaller of the precision's peak and intensity × bandwidth, measured in this run.",
        "Multiply-adds are what papers call FLOPs; GFLOP/s count two operations each.",
        "Cold start: in a new process, files in the page cache.",
        "Peak memory: resident, of the row's own process, from its warm-up on; loading is in it on Windows and macOS.",
    ]
    if report.scenarios:
        said += [
            (
                "Scenarios: MLCommons' load generator, in runs shorter than a submission to MLPerf needs. Server: the "
                "highest Poisson rate that kept the limit, by bisection, one run per rate; ways take turns."
            ),
            (
                "error of scenarios: largest difference of what came back under load: from the trained network for "
                "tensors, from the answer to each picture alone for JPEG."
            ),
        ]
    return said


def _load(env: dict[str, Any]) -> str:
    load = env.get("load_average") or []
    return f"{load[0]:g}" if load else "unknown"


def _latency_table(report: Report, title: str, rows: Sequence[Row]) -> Table:
    columns = (
        *("format", "calls", "p50 ms", "p90", "p95", "p99", "min", "max", "mean"),
        *("images/s", "vs base", "error", "of roof", "peak MB"),
    )
    rows = [row for row in rows if row.summary is not None]
    first = next((row for row in rows if row.format == report.baseline and row.summary), None)
    first = first or next(iter(rows), None)
    return Table(title, columns, tuple(_latency_cells(row, base=row is first) for row in rows))


def _missing_table(report: Report) -> Table:
    """Return one line per row that has no figures, with its reason: once, where several batches share it."""
    missing = [(row.model, row.name, row.reason) for row in report.rows if row.summary is None]
    left_out = [
        row for row in report.scenarios if row.figure is None and (row.model, row.name, row.reason) not in missing
    ]
    missing += [(row.model, f"{row.name}, {WAYS[row.way].title}", row.reason) for row in left_out]
    return Table("not measured", ("model", "format", "why"), tuple(dict.fromkeys(missing)), left=3)


def _scenario_tables(report: Report) -> Iterator[Table]:
    """Yield one table per model and source of samples; a line per format and way."""
    seen = [scenario for scenario in SCENARIOS if any(row.scenario == scenario for row in report.scenarios)]
    headings = {
        "single-stream": ("single-stream p90 ms",),
        "offline": ("offline samples/s", "vs one at a time"),
        "server": ("server samples/s", "vs one at a time", "its p99 ms"),
    }
    columns = ("format", "way", *(word for scenario in seen for word in headings[scenario]), "error")
    for model, source in dict.fromkeys((row.model, row.source) for row in report.scenarios):
        rows = {row.key: row for row in report.scenarios if (row.model, row.source) == (model, source)}
        lines = []
        for key in dict.fromkeys((model, row.format, row.precision, source, row.way) for row in rows.values()):
            found = [rows[(*key[:3], scenario, *key[3:])] for scenario in seen]
            if any(row.figure is not None for row in found):
                cells = [cell for row in found for cell in _scenario_cells(row, rows)]
                errors = [run.max_abs_error for row in found for run in (row.run, *row.tried) if run is not None]
                lines.append((found[0].name, WAYS[key[4]].title, *cells, f"{max(errors):.1e}" if errors else ""))
        limits = {row.limit_ms for row in rows.values() if row.limit_ms is not None}
        limit = "".join(f"; server: 99 % within {limit:g} ms" for limit in limits)
        if lines:
            yield Table(f"{model}, load scenarios {SOURCES[source]}{limit}", columns, tuple(lines), left=2)


def _scenario_cells(row: ScenarioRow, rows: Mapping[_Key, ScenarioRow]) -> tuple[str, ...]:
    """Return the figure of a row, its ratio to the first way of the same format, and what else its scenario has."""
    first = rows[(*row.key[:5], next(iter(WAYS)))]
    figure = "–" if row.figure is None else _ms(row.figure)
    ratio = times(row.figure / first.figure) if row.figure is not None and first.figure else "–"
    ratio = "base" if row is first and row.figure else ratio
    if row.scenario == "single-stream":
        return (figure,)
    return (figure, ratio) if row.scenario == "offline" else (figure, ratio, _ms(row.run.p99_ms if row.run else None))


def _latency_cells(row: Row, *, base: bool) -> tuple[str, ...]:
    s, roof = row.summary, row.roofline
    if s is None:
        raise AssertionError("a row without figures is in the table of what was not measured")
    latencies = (s.p50_ms, s.p90_ms, s.p95_ms, s.p99_ms, s.min_ms, s.max_ms, s.mean_ms)
    return (
        row.name,
        str(s.calls),
        *(_ms(ms) for ms in latencies),
        f"{s.images_per_s:.1f}" if s.images_per_s < 100 else f"{s.images_per_s:.0f}",  # noqa: PLR2004 - three digits do
        "base" if base else _ratio(row),
        "" if row.error is None else f"{row.error.max_abs:.1e}",
        "" if roof is None or roof.share is None else f"{100 * roof.share:.0f} %",
        "" if row.memory is None else f"{row.memory.peak_bytes / 1e6:.0f}",
    )


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.1 else f"{value:.3f}"  # noqa: PLR2004 - three digits do


def _ratio(row: Row) -> str:
    ratio = row.ratio
    if ratio is None:
        return ""
    value = times(ratio.value)
    if ratio.low is None or ratio.high is None:
        return f"{value} (one round)"
    mark = "≈ " if ratio.verdict == "not distinguishable" else ""
    return f"{mark}{value} ({times(ratio.low)}–{times(ratio.high)})"


def times(value: float) -> str:
    """Return a ratio such as `3.42×`, with three digits and never an exponent."""
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×" if value < 100 else f"{value:,.0f}×"  # noqa: PLR2004 - three digits do


def _proof_table(report: Report) -> Table:
    columns = ("model", "format", "precision", "runs", "import s", "load s", "first ms")
    seen: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for row in report.rows:
        key = (row.model, row.format, row.precision)
        if key in seen:
            continue
        cold = row.cold
        told = ("", "", "") if cold is None else (f"{cold.import_s:.2f}", f"{cold.load_s:.2f}", _ms(cold.first_ms))
        seen[key] = (*key, _proof(row) if row.proof else f"did not run: {row.reason}", *told)
    first = next((row.cold.batch for row in report.rows if row.cold is not None), 1)
    title = f"what ran, as the runtimes themselves say; cold start at batch {first}"
    return Table(title, columns, tuple(seen.values()), left=4)


def _proof(row: Row) -> str:
    """Return the runtime's own words; digests stay in the JSON."""
    told = {key: value for key, value in row.proof.items() if key not in ("sha256", "runtime") and value is not None}
    return "; ".join([str(row.proof.get("runtime", "")), *(f"{key} {_plain(value)}" for key, value in told.items())])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{amount} {kind}" for kind, amount in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _counts_table(report: Report) -> Table:
    columns = (
        *("model", "graph", "parameters M", "multiply-adds G/image"),
        *("weights MB", "traffic MB/image", "least MB/image", "operations"),
    )
    rows = tuple(
        (
            model,
            graph,
            f"{counts.parameters / 1e6:.3f}",
            f"{counts.macs / 1e9:.4f}",
            f"{4 * counts.weight_elements / 1e6:.1f}",
            f"{4 * counts.activation_elements / 1e6:.1f}",
            f"{4 * counts.io_elements / 1e6:.2f}",
            str(len(counts.operations)),
        )
        for model, graphs in report.counts.items()
        for graph, counts in graphs.items()
    )
    return Table("what is computed, in fp32; traffic is without weights", columns, rows, left=2)


def _profile_table(report: Report) -> Table:
    columns = ("model", "format", "precision", "batch", "stage", "operation", "ms", "share")
    totals: dict[tuple[str, str, str, int], float] = {}
    for line in report.profile:
        key = (line.model, line.format, line.precision, line.batch)
        totals[key] = totals.get(key, 0.0) + line.ms
    rows = tuple(
        (
            *(line.model, line.format, line.precision, str(line.batch), line.stage, line.op, f"{line.ms:.3f}"),
            f"{100 * line.ms / totals[line.model, line.format, line.precision, line.batch]:.1f} %",
        )
        for line in report.profile
        if line.ms >= 0.01 * totals[line.model, line.format, line.precision, line.batch]
    )
    return Table(
        "time per stage and operation as the runtimes tell it; parts under 1 % left out", columns, rows, left=6
    )


def to_markdown(report: Report) -> str:
    """Return the report as Markdown; its cells hold nothing that would break a table."""
    lines = [f"# {report.title}", "", f"{report.created}", ""]
    for table in tables(report):
        lines += [f"## {table.title}", "", _markdown_line(table.columns)]
        lines.append("|" + "|".join("---" if i < table.left else "--:" for i in range(len(table.columns))) + "|")
        lines += [_markdown_line(row) for row in table.rows]
        lines.append("")
    lines += [*(f"- {line}" for line in facts(report)), "", *(f"- {line}" for line in conventions(report))]
    return "\n".join(lines) + "\n"


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def to_csv(report: Report) -> str:
    """Return one line per row, with unrounded figures and units in the headings; empty if there is no figure.

    The mode of a scenario's row is the scenario, its source and way; its images per second are those of the figure.
    """
    buffer = io.StringIO()
    lines = [_csv_cells(row) for row in report.rows]
    blank = dict.fromkeys(lines[0]) if lines else {}
    lines += [blank | _scenario_csv(row) for row in report.scenarios]
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]) if lines else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _csv_cells(row: Row) -> dict[str, Any]:
    parts: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
        (
            "",
            row.summary,
            ("calls", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "min_ms", "max_ms", "mean_ms", "images_per_s"),
        ),
        ("ratio_", row.ratio, ("value", "low", "high", "verdict")),
        ("cold_", row.cold, ("import_s", "load_s", "first_ms")),
        ("memory_", row.memory, ("peak_bytes", "imports_bytes")),
        ("error_", row.error, ("max_abs", "max_rel", "top1", "allowed")),
        ("roofline_", row.roofline, ("gflops", "intensity", "attainable_gflops", "share")),
    )
    cells: dict[str, Any] = {
        name: getattr(row, name) for name in ("model", "format", "precision", "batch", "mode", "status", "reason")
    }
    for prefix, part, names in parts:
        cells |= {f"{prefix}{name}": None if part is None else getattr(part, name) for name in names}
    return cells


def _scenario_csv(row: ScenarioRow) -> dict[str, Any]:
    run = row.run
    cells: dict[str, Any] = {
        "model": row.model,
        "format": row.format,
        "precision": row.precision,
        "mode": f"{row.scenario}, {row.source}, {row.way}",
        "status": row.status,
        "reason": row.reason,
    }
    if run is not None:
        rate = run.samples_per_s if run.asked_per_s is None else run.asked_per_s
        cells |= {"calls": run.samples, "images_per_s": rate, "error_max_abs": run.max_abs_error}
        cells |= {name: getattr(run, name) for name in ("p50_ms", "p90_ms", "p99_ms")}
    return cells
