"""`repmlp-export` and `export.py`: a trained checkpoint to a verified bundle."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repmlp_deploy.bundle import Bundle, GraphRecord, Hop, Manifest, Verdict
from repmlp_deploy.cli.shared import engine_options as words
from repmlp_deploy.cli.shared import export_options as asked
from repmlp_deploy.cli.shared.console import print_json, print_line, print_table, progress, run_command
from repmlp_deploy.cli.shared.engine_report import print_engines
from repmlp_deploy.convert.formats import parse_formats
from repmlp_deploy.convert.options import (
    GRAPHS,
    parse_profiles,
    parse_size,
    require_choice,
    whole_range,
)
from repmlp_deploy.numerics import TOLERANCES
from repmlp_deploy.precision import PRECISIONS

__all__ = ["main", "print_hops", "print_report", "print_verdict"]

_ROUND = 100.0  # margins from here on are whole numbers


def main() -> None:
    """Run the command of this process."""
    run_command(export_command)


def export_command(  # noqa: PLR0913 - one per option
    ckpt: asked.Checkpoint,
    module: asked.Module = None,
    card: asked.Card = None,
    input_size: asked.InputSize = None,
    formats: asked.Formats = "onnx",
    graph: asked.Graph = "folded",
    precision: asked.Precision = "fp32",
    batch: asked.Batch = "1:8:64",
    workspace_gb: words.WorkspaceGb = None,
    tf32: words.Tf32 = False,
    optimization_level: words.OptimizationLevel = None,
    timing_cache: words.TimingCache = "auto",
    version_compatible: words.VersionCompatible = False,
    hardware_compatible: words.HardwareCompatible = False,
    compute_capability: words.Capabilities = None,
    refittable: words.Refittable = False,
    strip_weights: words.StripWeights = False,
    verbosity: words.Verbosity = "error",
    calibration: asked.Calibration = None,
    calibration_method: asked.CalibrationMethod = "minmax",
    keep_fp32: asked.KeepFp32 = None,
    sensitivity: asked.Sensitivity = False,
    weights: asked.Weights = None,
    out: asked.Out = None,
    allow_merged: asked.AllowMerged = False,
    json: asked.Json = False,
    debug: asked.Debug = False,  # noqa: ARG001 - read by console
) -> None:
    """Merge a trained RepMLP, prove the result equal to it, and export it."""
    wanted, profiles = parse_formats(formats), parse_profiles(batch)
    tuning = words.Tuning(workspace_gb, tf32, optimization_level, timing_cache, verbosity)
    reach = words.Reach(version_compatible, hardware_compatible, compute_capability, refittable, strip_weights)
    choices = {
        "module": module,
        "card": card,
        "input_size": None if input_size is None else parse_size(input_size),
        "formats": wanted,
        "graph": graph,
        "precision": precision,
        "batch": whole_range(profiles),
        "engine": words.read_engine_options(wanted, profiles if len(profiles) > 1 else (), tuning, reach),
        "calibration": calibration,
        "calibration_method": calibration_method,
        "keep_fp32": keep_fp32 or (),
        "sensitivity": sensitivity,
        "weights": weights,
        "out": out,
        "allow_merged": allow_merged,
    }
    require_choice("--graph", graph, GRAPHS)
    require_choice("--precision", precision, tuple(PRECISIONS))
    bundle = _export(ckpt, choices)
    if json:
        print_json({"out": str(bundle.folder), **bundle.manifest.as_json()})
    else:
        print_report(bundle)


def _export(ckpt: Path, choices: dict[str, Any]) -> Bundle:
    """Run the export with a progress display."""
    with progress() as show:
        show("loading PyTorch")
        from repmlp_deploy.convert.pipeline import export  # noqa: PLC0415 - seconds: not for --help or a bad option

        gc.freeze()  # half a million objects of libraries, which no search for cycles need visit again
        return export(ckpt, **choices, progress=show)


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
                "" if hop.margin is None else f"{hop.margin:,.0f}×" if hop.margin >= _ROUND else f"{hop.margin:.3g}×",
                "" if hop.top1 is None else f"{100 * hop.top1:g} %",
            )
            for hop in hops
        ],
        left=2,
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


def print_report(bundle: Bundle) -> None:
    """Print the verdicts, the artifacts and the notes."""
    manifest = bundle.manifest
    print_hops(f"{manifest.name}: distance from the trained network in float64", manifest.certificate)
    print_verdict(manifest.verdict)
    print_table(
        "artifacts",
        ("format", "file", "precision", "MB"),
        [
            (
                name,
                ", ".join(file.path for file in (entry, *entry.companions)),
                entry.precision,
                f"{sum(file.bytes for file in (entry, *entry.companions)) / 1e6:.1f}",
            )
            for name, entry in manifest.artifacts.items()
        ],
        left=3,
    )
    print_engines(bundle)
    for line in _precision_lines(manifest):
        print_line(f"{line}")
    for note in manifest.notes:
        print_line(f"note: {note}")
    seconds = sum(manifest.origin.seconds.values())
    print_line(f"{bundle.folder}: complete after {seconds:.1f} s")


def _precision_lines(manifest: Manifest) -> list[str]:
    """Return what computes in the precision and what stays in float32; nothing for a float32 graph."""
    found = ((entry, entry.record(GraphRecord)) for entry in manifest.artifacts.values())
    entry, graph = next(((entry, graph) for entry, graph in found if graph.lowered), (None, GraphRecord()))
    if entry is None:
        return []
    if graph.sensitivity:
        print_table(
            f"largest error if only this block is {entry.precision}",
            ("block", "max error"),
            [(line.block, f"{line.max_abs:.2e}") for line in graph.sensitivity],
            left=1,
        )
    lines = [f"{entry.precision}: " + ", ".join(f"{count} {op}" for op, count in graph.lowered.items())]
    by_reason: dict[str, list[str]] = {}
    for kept in graph.kept_fp32:
        by_reason.setdefault(kept.reason, []).append(kept.name())
    return lines + [f"fp32: {', '.join(names)} ({reason})" for reason, names in by_reason.items()]
