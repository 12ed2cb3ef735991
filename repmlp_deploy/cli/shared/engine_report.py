"""What the report says of engines."""

from __future__ import annotations

from typing import Any

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.cli.shared.console import print_line, print_table
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS

__all__ = ["print_engines"]


def print_engines(bundle: Bundle) -> None:
    """A table with a line an engine, and what its builder warned of; nothing where there is none."""
    described = {n: entry.model_extra or {} for n, entry in bundle.manifest.artifacts.items() if n in FLAVOURS}
    described = {name: details for name, details in described.items() if "profiles" in details}
    if not described:
        return
    columns = ("engine", "builder", "GPUs", "batch", "layers", "products", "weights MB", "scratch MB", "build s")
    print_table("engines", columns, [_row(name, details) for name, details in described.items()], left=4)
    for name, details in described.items():
        for warning in details["warnings"]:
            print_line(f"{name} warned: {warning}")


def _row(name: str, details: dict[str, Any]) -> tuple[str, ...]:
    capabilities = details["compute_capabilities"]
    return (
        name,
        details["version"],
        "the builder's choice" if capabilities is None else ", ".join(capabilities),
        ", ".join(_batch(profile) for profile in details["profiles"]),
        str(details["layers"]),
        ", ".join(f"{count} {kind}" for kind, count in details["product_types"].items()),
        _megabytes(details.get("weights_bytes")),
        _megabytes(details.get("scratch_bytes")),
        f"{details['build_seconds']:.1f}",
    )


def _batch(profile: dict[str, list[list[int]]]) -> str:
    """`1:8:64` of a profile."""
    return ":".join(str(shape[0]) for shape in next(iter(profile.values())))


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"
