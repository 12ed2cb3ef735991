"""Print what a bundle says of its engines."""

from __future__ import annotations

from collections.abc import Mapping

from repmlp_deploy.bundle import Bundle, EngineReport
from repmlp_deploy.cli.shared.console import print_line, print_table
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS

__all__ = ["print_engines"]


def print_engines(bundle: Bundle) -> None:
    """Print a table with one line per engine, and what its builder warned of; nothing without an engine."""
    described = {
        name: entry.record(EngineReport) for name, entry in bundle.manifest.artifacts.items() if name in FLAVOURS
    }
    if not described:
        return
    columns = ("engine", "builder", "GPUs", "batch", "layers", "products", "weights MB", "scratch MB", "build s")
    print_table("engines", columns, [_row(name, engine) for name, engine in described.items()], left=4)
    for name, engine in described.items():
        for warning in engine.warnings:
            print_line(f"{name} warned: {warning}")


def _row(name: str, engine: EngineReport) -> tuple[str, ...]:
    capabilities = engine.compute_capabilities
    return (
        name,
        engine.version,
        "the builder's choice" if capabilities is None else ", ".join(capabilities),
        ", ".join(_batch(profile) for profile in engine.profiles),
        str(engine.layers),
        ", ".join(f"{count} {kind}" for kind, count in engine.product_types.items()),
        _megabytes(engine.weights_bytes),
        _megabytes(engine.scratch_bytes),
        f"{engine.build_seconds:.1f}",
    )


def _batch(profile: Mapping[str, tuple[tuple[int, ...], ...]]) -> str:
    """Return `1:8:64` of a profile."""
    return ":".join(str(shape[0]) for shape in next(iter(profile.values())))


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"
