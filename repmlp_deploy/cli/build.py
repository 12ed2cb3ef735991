"""`repmlp-build BUNDLE`: engines for a bundle from its verified ONNX graph, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.cli.shared import engine_options as words
from repmlp_deploy.cli.shared.console import print_json, print_line, run_command, typer
from repmlp_deploy.cli.shared.engine_report import print_engines
from repmlp_deploy.cli.shared.progress import progress
from repmlp_deploy.convert.formats import parse_formats
from repmlp_deploy.convert.options import parse_profiles
from repmlp_deploy.errors import InputError

__all__ = ["main"]


def main() -> None:
    """Run the command of this process."""
    run_command(build_command)


def build_command(  # noqa: PLR0913 - one per option
    bundle: Annotated[Path, typer.Argument(help="The folder that repmlp-export wrote, with an ONNX graph.")],
    formats: Annotated[str | None, typer.Option("--format", help="Comma-separated: trt, trt-rtx (default).")] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="MIN:OPT:MAX[,…]", help="Batch sizes per profile; default: what the bundle serves."),
    ] = None,
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
    refit_from: Annotated[
        Path | None,
        typer.Option(metavar="CKPT", help="Do not build: give graph and engines the weights of this checkpoint."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="model or ema, if CKPT has both.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result; default: replace the bundle.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The report as one JSON object on stdout.")] = False,
) -> None:
    """Build TensorRT engines from a bundle's verified ONNX graph, and put them into the bundle."""
    wanted = parse_formats("trt-rtx" if formats is None else formats)
    tuning = words.Tuning(workspace_gb, tf32, optimization_level, timing_cache, verbosity)
    reach = words.Reach(version_compatible, hardware_compatible, compute_capability, refittable, strip_weights)
    engine = words.read_engine_options(wanted, () if batch is None else parse_profiles(batch), tuning, reach)
    if refit_from is not None and (formats is not None or engine.asked()):
        raise InputError("--refit-from keeps engines as they were built: leave --format and engine options out")
    if refit_from is None and weights is not None:
        raise InputError("--weights is about the checkpoint of --refit-from, and there is none")
    with progress() as show:
        if refit_from is None:
            from repmlp_deploy.convert.rework.add_engine import add_engines  # noqa: PLC0415 - onnx, which may be missing

            built = add_engines(bundle, wanted, engine, out=out, progress=show)
        else:
            show("loading PyTorch")
            from repmlp_deploy.convert.rework.refit import refit_bundle  # noqa: PLC0415 - torch is not needed to build

            built = refit_bundle(bundle, refit_from, weights=weights, out=out, progress=show)
    _report(built, json=json)


def _report(bundle: Bundle, *, json: bool) -> None:
    if json:
        print_json({"out": str(bundle.folder), **bundle.manifest.as_json()})
    else:
        print_engines(bundle)
        for note in bundle.manifest.notes:
            print_line(f"note: {note}")
        print_line(f"{bundle.folder}: complete")
