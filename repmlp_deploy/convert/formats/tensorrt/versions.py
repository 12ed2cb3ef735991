"""What differs between the versions of TensorRT that this project supports, 10.13 to 11: the only place that knows.

A name of this table is asked of the installed module before it is used. Every other name of NVIDIA's bindings that our
sources use is in all supported versions; tests check that against the real bindings of the oldest and the newest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

__all__ = ["DIFFERENCES", "Difference", "find_name", "has_name"]


@dataclass(frozen=True)
class Difference:
    """A name that only some versions of TensorRT have.

    Attributes:
        since: the first version that has it; None if the oldest supported one does.
        until: the first version without it again; None if the newest supported one has it.
        without: what our code does in a version without it.
    """

    since: str | None
    until: str | None
    without: str


DIFFERENCES = {
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": Difference(
        None, "11.0", "a network has an explicit batch without being told; the flag has no effect from 10.0 on"
    ),
    "SerializationFlag.INCLUDE_REFIT": Difference(
        "10.14", None, "refitting is refused: the engine could not be refitted a second time"
    ),
}
"""Name in NVIDIA's module to the versions that have it."""


def find_name(trt: Any, path: str) -> Any:
    """Return what a module has under a dotted name such as `BuilderFlag.TF32`; None if it has nothing there."""
    return reduce(lambda value, part: getattr(value, part, None), path.split("."), trt)


def has_name(trt: Any, path: str) -> bool:
    """Tell whether a module has a dotted name."""
    return find_name(trt, path) is not None
