"""What a session knows of its rows while it runs: the process of each, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from repmlp_deploy.bench.crew import Child
from repmlp_deploy.bench.measure.results import ColdStart, Error, Memory
from repmlp_deploy.bench.measure.timing import Warmup
from repmlp_deploy.bench.targets import Target

__all__ = ["Member", "Record"]


@dataclass
class Member:
    """One opened row: a child and what is known of it at every batch size."""

    format: str
    precision: str
    child: Child
    cold: ColdStart
    imports_bytes: int
    proof: dict[str, Any]
    error: Error
    failed: str = ""


@dataclass
class Record:
    """What was measured of one row."""

    target: Target
    format: str
    precision: str
    batch: int
    mode: str
    status: str = "unavailable"
    reason: str = "not reached"
    member: Member | None = None
    warmup: Warmup | None = None
    memory: Memory | None = None
    call_seconds: float = 0.0
    rounds: list[list[float]] = field(default_factory=list)
    on_device: dict[str, float] = field(default_factory=dict)
