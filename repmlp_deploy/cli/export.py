"""`repmlp-export` and `export.py`: a trained checkpoint to a verified bundle."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.cli.shared import description as said
from repmlp_deploy.cli.shared import engine_options as words
from repmlp_deploy.cli.shared import export_options as asked
from repmlp_deploy.cli.shared.bundle_report import print_details, print_sensitivity, print_summary
from repmlp_deploy.cli.shared.console import print_json, print_warnings, run_command
from repmlp_deploy.cli.shared.progress import Phases, progress
from repmlp_deploy.convert.formats import parse_formats
from repmlp_deploy.convert.options import (
    GRAPHS,
    parse_profiles,
    parse_size,
    require_choice,
    whole_range,
)
from repmlp_deploy.evaluation.loop import LabelledFolder
from repmlp_deploy.precision import PRECISIONS

__all__ = ["main"]


def main() -> None:
    """Run the command of this process."""
    run_command(export_command)


def export_command(  # noqa: PLR0913 - one per option
    ckpt: asked.Checkpoint,
    module: asked.Module = None,
    model: asked.Model = None,
    card: asked.Card = None,
    input_size: asked.InputSize = None,
    formats: asked.Formats = "onnx",
    graph: asked.Graph = "folded",
    merge: asked.Merge = "auto",
    input_type: asked.Input = "float32",
    precision: asked.Precision = "fp32",
    batch: asked.Batch = "1:8:64",
    opset: asked.Opset = None,
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
    calibration_method: asked.CalibrationMethod = None,
    keep_fp32: asked.KeepFp32 = None,
    sensitivity: asked.Sensitivity = False,
    max_drop: asked.MaxDrop = None,
    eval_: asked.Eval = None,
    weights: asked.Weights = None,
    state_key: asked.StateKey = None,
    ignore: asked.Ignore = None,
    mean: said.Mean = None,
    std: said.Std = None,
    resize: said.ResizeTo = None,
    crop: said.Crop = None,
    labels: said.Labels = None,
    scores: said.ScoresOf = None,
    out: asked.Out = None,
    allow_merged: asked.AllowMerged = False,
    details: asked.Details = False,
    json: asked.Json = False,
) -> None:
    """Merge a trained RepMLP, prove the result equal to it, and export it."""
    wanted, profiles = parse_formats(formats), parse_profiles(batch)
    tuning = words.Tuning(workspace_gb, tf32, optimization_level, timing_cache, verbosity)
    reach = words.Reach(version_compatible, hardware_compatible, compute_capability, refittable, strip_weights)
    choices = {
        "module": module,
        "model": model,
        "card": card,
        "input_size": None if input_size is None else parse_size(input_size),
        "formats": wanted,
        "graph": graph,
        "merge": merge,
        "input": input_type,
        "precision": precision,
        "batch": whole_range(profiles),
        "opset": opset,
        "engine": words.read_engine_options(wanted, profiles if len(profiles) > 1 else (), tuning, reach),
        "calibration": calibration,
        "calibration_method": calibration_method,
        "keep_fp32": keep_fp32 or (),
        "sensitivity": sensitivity,
        "max_drop": max_drop,
        "labelled": None if eval_ is None else LabelledFolder(eval_),
        "weights": weights,
        "state_key": state_key,
        "ignore": ignore or (),
        "description": said.read_description(mean, std, resize, crop, labels, scores),
        "out": out,
        "allow_merged": allow_merged,
    }
    require_choice("--graph", graph, GRAPHS)
    require_choice("--precision", precision, tuple(PRECISIONS))
    bundle = _export(ckpt, choices)
    print_warnings(bundle.manifest.warnings)
    if json:
        print_json({"out": str(bundle.folder), **bundle.manifest.as_json()})
        return
    if details:
        print_details(bundle)
    if sensitivity or details:
        print_sensitivity(bundle)
    print_summary(bundle)


def _export(ckpt: Path, choices: dict[str, Any]) -> Bundle:
    """Run the export with a progress display."""
    phases = Phases(choices["formats"], choices["precision"])
    with progress(left=phases.seconds_left) as show:
        show("loading PyTorch")
        # seconds of imports: not for --help or a bad option
        from repmlp_deploy.convert.pipeline import export  # noqa: PLC0415
        from repmlp_deploy.convert.source.description import Description  # noqa: PLC0415

        gc.freeze()  # half a million objects of libraries, which no search for cycles need visit again
        described = choices | {"description": Description(**choices["description"])}
        return export(ckpt, **described, progress=lambda step: show(phases.number(step)))
