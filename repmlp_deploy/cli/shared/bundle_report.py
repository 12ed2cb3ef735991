"""What a bundle says of itself, on a terminal: a summary of a few lines, and all the details."""

from __future__ import annotations

from collections.abc import Sequence
from shlex import quote

from repmlp_deploy.bundle import ArtifactEntry, Bundle, GraphRecord, Hop, Manifest, Verdict
from repmlp_deploy.cli.shared.console import print_line, print_table, print_verdict_line
from repmlp_deploy.cli.shared.engine_report import print_engines
from repmlp_deploy.numerics import TOLERANCES
from repmlp_deploy.runtime.runner import RUNNERS
from repmlp_deploy.runtime.tasks import find_task

__all__ = ["print_details", "print_hops", "print_sensitivity", "print_summary", "print_verdict"]

_ROUND = 100.0  # margins from here on are whole numbers
_STYLES = {"equal": "green", "close": "yellow", "FAILED": "bold red"}


def print_hops(title: str, hops: Sequence[Hop]) -> None:
    """Print a table with one line per comparison."""
    print_table(
        title,
        (
            "step",
            "verdict",
            "batch",
            "max error",
            "mean error",
            "relative",
            "between",
            "1 - cos",
            "floors",
            "allowed",
            "margin",
            "top-1",
        ),
        [
            (
                hop.name,
                hop.note if hop.passed is None else _verdict(hop),
                str(hop.batch or ""),
                f"{hop.max_abs:.2e}",
                f"{hop.mean_abs:.2e}",
                f"{hop.max_rel:.1e}",
                "" if hop.between is None else f"{hop.between:.1e}",
                f"{max(0.0, 1 - hop.cosine):.0e}",
                "" if hop.ratio is None else f"{hop.ratio:.2g}",
                f"{hop.allowed:.2e}",
                "" if hop.margin is None else _margin(hop.margin),
                "" if hop.top1 is None else f"{100 * hop.top1:g} %",
            )
            for hop in hops
        ],
        left=2,
        narrow=("step", "verdict", "batch", "max error", "allowed", "margin"),
        styles=_STYLES,
    )


def print_verdict(verdict: Verdict) -> None:
    """Print one line under the table: whether every tolerance is met, and by what margin."""
    if verdict.margin is not None:
        met = "every tolerance is met" if verdict.passed else "not every tolerance is met"
        print_line(f"{met}; the closest is {verdict.closest}, with a margin of {verdict.margin:.3g}")


def _verdict(hop: Hop) -> str:
    """Return `equal` if only float32's own rounding is allowed, `close` if a precision costs more."""
    exact = hop.kind != "output" or hop.allowed <= TOLERANCES["fp32"].floor_ratio * hop.floor
    return ("equal" if exact else "close") if hop.passed else "FAILED"


def print_details(bundle: Bundle) -> None:
    """Print every row of the certificate, the artifacts, what an engine and a precision are made of, and the notes."""
    manifest = bundle.manifest
    print_hops(f"{manifest.name}: distance from the trained network in float64", manifest.certificate)
    print_verdict(manifest.verdict)
    print_table(
        "artifacts",
        ("format", "file", "precision", "MB"),
        [(name, *_described(entry)) for name, entry in manifest.artifacts.items()],
        left=3,
    )
    print_engines(bundle)
    for line in _precision_lines(manifest):
        print_line(line)
    for note in manifest.notes:
        print_line(f"note: {note}")


def print_sensitivity(bundle: Bundle) -> None:
    """Print what each block costs, the worst first, if the export measured it."""
    entry, graph = _lowered(bundle.manifest)
    if entry is not None and graph.sensitivity:
        print_table(
            f"largest error if only this block is {entry.precision}",
            ("block", "max error"),
            [(line.block, f"{line.max_abs:.2e}") for line in graph.sensitivity],
            left=1,
        )


def print_summary(bundle: Bundle) -> None:
    """Print the verdict, the tightest margin, the files and the next command: a line each."""
    manifest, verdict = bundle.manifest, bundle.manifest.verdict
    hops = [hop for hop in manifest.certificate if hop.passed is not None]
    origin = manifest.origin.checkpoint
    reference = "merged" if origin is not None and origin.merged else "trained"
    found = f"equal to the {reference} network" if verdict.passed else f"NOT equal to the {reference} network"
    precision = next(iter(manifest.artifacts.values())).precision
    if precision not in ("", "fp32"):
        found = f"close to the {reference} network in {precision}" if verdict.passed else found
    print_verdict_line(f"{manifest.name}: {found}, in {len(hops)} comparisons", passed=verdict.passed)
    if verdict.margin is not None:
        print_line(f"closest to its limit: {verdict.closest}, with a margin of {_margin(verdict.margin)}")
    last = next((hop for hop in reversed(hops) if hop.kind == "output"), None)
    if last is not None:
        same = "" if last.top1 is None else f"; the same class for {100 * last.top1:g} % of the probe"
        outputs = f", of outputs up to {last.max_abs / last.max_rel:.3g}" if last.max_rel else ""
        print_line(f"error of the last artifact: {last.max_abs:.2e}{outputs}{same}")
    for note in manifest.notes:
        if note.startswith("regions:"):
            print_line(note)
    for name, entry in manifest.artifacts.items():
        files, kind, size = _described(entry)
        print_line(f"{name}: {files}, {kind}, {size} MB")
        accuracy = entry.record(GraphRecord).accuracy
        if accuracy is not None:
            print_line(f"{name}: {accuracy.summary()}")
    seconds = sum(manifest.origin.seconds.values())
    print_line(f"{bundle.folder}: complete after {seconds:.1f} s; --details shows every comparison")
    folder = quote(str(bundle.folder))
    runs = f"repmlp-predict {folder} IMAGE"
    print_line(f"next: {runs if _takes_images(manifest) else _verify(folder)}")


def _takes_images(manifest: Manifest) -> bool:
    return not find_task(manifest.task).refusal and any(name in RUNNERS for name in manifest.artifacts)


def _verify(folder: str) -> str:
    return f"repmlp-verify {folder}, on the machine that will run it"


def _described(entry: ArtifactEntry) -> tuple[str, str, str]:
    """Return the files, the precision and the megabytes of an artifact."""
    files = (entry, *entry.companions)
    return ", ".join(file.path for file in files), entry.precision, f"{sum(file.bytes for file in files) / 1e6:.1f}"


def _margin(margin: float) -> str:
    return f"{margin:,.0f}×" if margin >= _ROUND else f"{margin:.3g}×"


def _lowered(manifest: Manifest) -> tuple[ArtifactEntry | None, GraphRecord]:
    """Return the first artifact that computes some of its operations in another type than float32, and its record."""
    found = ((entry, entry.record(GraphRecord)) for entry in manifest.artifacts.values())
    return next(((entry, graph) for entry, graph in found if graph.lowered), (None, GraphRecord()))


def _precision_lines(manifest: Manifest) -> list[str]:
    """Return what computes in the precision and what stays in float32; nothing for a float32 graph."""
    entry, graph = _lowered(manifest)
    if entry is None:
        return []
    lines = [f"{entry.precision}: " + ", ".join(f"{count} {op}" for op, count in graph.lowered.items())]
    by_reason: dict[str, list[str]] = {}
    for kept in graph.kept_fp32:
        by_reason.setdefault(kept.reason, []).append(kept.name())
    return lines + [f"fp32: {', '.join(names)} ({reason})" for reason, names in by_reason.items()]
