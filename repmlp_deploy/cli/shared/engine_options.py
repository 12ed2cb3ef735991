"""The options for engines, the same for every command that builds one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.cli.shared.console import typer
from repmlp_deploy.convert.engine_options import EngineOptions, parse_capabilities, with_profiles
from repmlp_deploy.convert.formats import require_engine

__all__ = [
    "Capabilities",
    "HardwareCompatible",
    "OptimizationLevel",
    "Reach",
    "Refittable",
    "StripWeights",
    "Tf32",
    "TimingCache",
    "Tuning",
    "Verbosity",
    "VersionCompatible",
    "WorkspaceGb",
    "read_engine_options",
]

WorkspaceGb = Annotated[float | None, typer.Option("--workspace-gb", help="Most scratch memory, in GiB.")]
Tf32 = Annotated[bool, typer.Option("--tf32/--no-tf32", help="Round the factors of float32 products to TF32.")]
OptimizationLevel = Annotated[int | None, typer.Option(metavar="0-5", help="How long the builder searches; default 3.")]
TimingCache = Annotated[str, typer.Option(metavar="FILE", help="auto, off or a file (trt).")]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="The engine runs in later versions (trt).")
]
HardwareCompatible = Annotated[
    bool, typer.Option("--hardware-compatible", help="The engine runs on Ampere and later GPUs (trt).")
]
Capabilities = Annotated[
    str | None,
    typer.Option(metavar="8.6,8.9,…", help="GPUs to build for (trt-rtx)."),
]
Refittable = Annotated[bool, typer.Option("--refittable", help="Weights can be replaced; needs a GPU.")]
StripWeights = Annotated[bool, typer.Option("--strip-weights", help="Leave weights out; needs a GPU.")]
Verbosity = Annotated[str, typer.Option(help="Messages of the builder: error, warning, info or verbose.")]


class Tuning(NamedTuple):
    """The options that decide how an engine is built."""

    workspace_gb: float | None
    tf32: bool
    optimization_level: int | None
    timing_cache: str
    verbosity: str


class Reach(NamedTuple):
    """The options that decide where an engine runs, and what can be done with it later."""

    version_compatible: bool
    hardware_compatible: bool
    compute_capability: str | None
    refittable: bool
    strip_weights: bool


def read_engine_options(
    formats: Sequence[str], profiles: Sequence[BatchRange], tuning: Tuning, reach: Reach
) -> EngineOptions:
    """Return the options of the command line as one value.

    Raises:
        InputError: one of them cannot be read, or none of `formats` is an engine.
    """
    capabilities = () if reach.compute_capability is None else parse_capabilities(reach.compute_capability)
    options = EngineOptions(
        **tuning._asdict(),
        version_compatible=reach.version_compatible,
        hardware_compatible=reach.hardware_compatible,
        compute_capabilities=capabilities,
        refittable=reach.refittable,
        strip_weights=reach.strip_weights,
    )
    options = with_profiles(options, profiles)
    require_engine(options, formats)
    return options
