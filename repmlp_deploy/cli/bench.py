"""`repmlp-bench`: latency, memory and FLOPs of one network in every format, with proof of what ran.

Exit codes beyond the common ones: 3 when `--compare` finds a row slower than before, beyond noise and threshold;
130 when interrupted, after the report of what had been measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from repmlp_deploy.cli.shared.console import (
    INTERRUPTED,
    print_json,
    print_line,
    print_table,
    run_command,
    typer,
)
from repmlp_deploy.cli.shared.progress import progress
from repmlp_deploy.errors import InputError, OutputError, VerificationError
from repmlp_deploy.files import write_named
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.text import escape_document

if TYPE_CHECKING:
    from repmlp_deploy.bench.measure.results import Report

__all__ = ["main"]

_LARGEST_THRESHOLD = 10_000
_THRESHOLD = 10.0


def main() -> None:
    """Run the command of this process."""
    run_command(bench_command)


def bench_command(  # noqa: PLR0913 - one per option
    models: Annotated[str | None, typer.Option(help="Cards, comma-separated; default repmlpnet-b224, seeded.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="Formats, comma-separated; default: all but torch-folded, torch-compile.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(PRECISIONS)}; default fp32,bf16; also tf32 with cuda.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="Where rows run; default cpu. cuda needs an NVIDIA GPU.")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Images per call, comma-separated; default 1.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference; default: all cores.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds of timing per row; default 8.")] = None,
    limit: Annotated[float | None, typer.Option(help="Begin no step after this many seconds; default 320.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Format that the others are compared with; default torch-merged.")
    ] = None,
    idle: Annotated[
        float | None, typer.Option(metavar="MS", help="Also measure with a gap of MS before every call.")
    ] = None,
    end_to_end: Annotated[
        bool | None, typer.Option("--end-to-end", help="Also measure from JPEG bytes to classes.")
    ] = None,
    profile: Annotated[
        bool | None, typer.Option("--profile", help="Also measure the time per stage and operation.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(help="Also measure under MLPerf's load: of single-stream, offline, server.")
    ] = None,
    p99: Annotated[
        float | None, typer.Option(metavar="MS", help="Limit of server's 99th percentile; default 100.")
    ] = None,
    ckpt: Annotated[Path | None, typer.Option(help="Trained checkpoint to measure.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="timm:NAME[,KEY=VALUE…]", help="The network of timm that --ckpt is for.")
    ] = None,
    card: Annotated[str | None, typer.Option(help="Card of --ckpt; default: inferred.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle to measure; no PyTorch rows.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Images or .npz to calibrate int8 with; default: seeded inputs.")
    ] = None,
    suite: Annotated[Path | None, typer.Option(help="TOML file with these settings.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Report with every latency; - for stdout.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="The rows as CSV.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="The tables as Markdown.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="One self-contained page with figures.")] = None,
    compare: Annotated[Path | None, typer.Option(metavar="OLD.json", help="Earlier report to compare with.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Change of latency in percent that --compare reports; default 10.")
    ] = None,
) -> None:
    """Measure latency, memory and multiply-adds of a RepMLP network in every format, against the machine's limit."""
    outputs = {"json": json, "csv": csv, "markdown": markdown, "html": html}
    given = {
        "models": models,
        "formats": formats,
        "precision": precision,
        "device": device,
        "batch": batch,
        "threads": threads,
        "seconds": seconds,
        "limit_seconds": limit,
        "baseline": baseline,
        "idle_ms": idle,
        "end_to_end": end_to_end,
        "profile": profile,
        "scenario": scenario,
        "p99_ms": p99,
        "ckpt": ckpt,
        "model": model,
        "card": card,
        "bundle": bundle,
        "calibration": calibration,
    }
    if threshold is not None and compare is None:
        raise InputError("--threshold is about the earlier report of --compare, and there is none")
    percent = _THRESHOLD if threshold is None else threshold
    if not 0 < percent <= _LARGEST_THRESHOLD:
        raise InputError(f"--threshold is {threshold:g}; expected percents, up to {_LARGEST_THRESHOLD}")
    old, report = _measured(suite, given, outputs, compare)
    _print_report(report, outputs)
    if old is not None:
        _compare(old, report, str(compare), percent, beside_json=_is_stdout(json))
    if report.interrupted:
        sys.stderr.write("interrupted: the report is of what had been measured\n")
        raise typer.Exit(INTERRUPTED)


def _measured(
    suite: Path | None, given: dict[str, Any], outputs: dict[str, Path | None], compare: Path | None
) -> tuple[Report | None, Report]:
    """Return the earlier report to compare with, if any, and the new one."""
    _check_outputs(outputs)
    with progress() as show:
        show("loading")
        # seconds of imports: not for --help or a path that cannot be written
        from repmlp_deploy.bench.measure.results import load_report  # noqa: PLC0415
        from repmlp_deploy.bench.session import run_benchmark  # noqa: PLC0415
        from repmlp_deploy.bench.settings import read_settings  # noqa: PLC0415

        if outputs["html"] is not None:  # a missing package is told before minutes of measuring, not after
            import_module("repmlp_deploy.bench.report.page")

        old = None if compare is None else load_report(compare)
        return old, run_benchmark(read_settings(suite, given), show)


def _print_report(report: Report, outputs: dict[str, Path | None]) -> None:
    """Print the tables, or the JSON if that was asked for, and write every file."""
    from repmlp_deploy.bench.report.tables import conventions, facts, tables, to_csv, to_markdown  # noqa: PLC0415 - see above

    writers: dict[str, Callable[[], str]] = {
        "json": report.to_json,
        "csv": lambda: to_csv(report),
        "markdown": lambda: to_markdown(report),
        "html": lambda: _page(report),
    }
    on_stdout = _is_stdout(outputs["json"])
    if on_stdout:
        print_json(report.model_dump(mode="json"))
    else:
        for table in tables(report):
            print_table(table.title, table.columns, table.rows, left=table.left)
        for line in (*facts(report), *conventions(report)):
            print_line(line)
    for name, path in outputs.items():
        if path is not None and not (name == "json" and on_stdout):
            _write(path, writers[name]())


def _page(report: Report) -> str:
    from repmlp_deploy.bench.report.page import to_html  # noqa: PLC0415 - matplotlib is needed for the page alone

    return to_html(report)


def _compare(old: Report, new: Report, name: str, threshold: float, *, beside_json: bool) -> None:
    """Print what changed; on stderr if stdout has the report as JSON.

    Raises:
        VerificationError: something became slower.
    """
    from repmlp_deploy.bench.report.compare import compare_reports, comparison_table  # noqa: PLC0415 - see above

    found = compare_reports(old, new, threshold / 100)
    table = comparison_table(found)
    print_table(table.title, table.columns, table.rows, left=table.left, stderr=beside_json)
    for note in found.notes:
        print_line(f"note: {note}", stderr=beside_json)
    slower = [f"{c.row.name} at batch {c.row.batch} ({100 * (c.ratio - 1):+.0f} %)" for c in found.slower]
    slower += [f"all rows ({100 * (found.drift - 1):+.0f} %)"] if found.drifted else []
    if slower:
        raise VerificationError(f"slower than {name}, beyond noise and {threshold:g} %: {', '.join(slower)}")


def _is_stdout(path: Path | None) -> bool:
    return str(path) == "-"


def _check_outputs(outputs: dict[str, Path | None]) -> None:
    """Raise before the run, not after it, where a report could not be written, or another would be written over it."""
    options: dict[Path, str] = {}
    for name, path in outputs.items():
        if path is None or (name == "json" and _is_stdout(path)):
            continue
        if _is_stdout(path):
            raise InputError(f"--{name} -: only --json goes to stdout; name a file")
        if path.is_dir():
            raise InputError(f"{path} is a folder; name a file")
        target = path.resolve()
        if not target.parent.is_dir():
            raise OutputError(f"could not write {path}: {target.parent} does not exist")
        if not os.access(target.parent, os.W_OK | os.X_OK) and (target.is_file() or not target.exists()):
            raise OutputError(f"could not write {path}: {target.parent} cannot be written to")
        if target in options and (target.is_file() or not target.exists()):  # a device takes several
            raise InputError(f"--{options[target]} and --{name} are both {path}; name two files")
        options[target] = name


def _write(path: Path, text: str) -> None:
    try:
        write_named(path, escape_document(text).encode())
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror or error}") from None
