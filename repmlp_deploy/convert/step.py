"""What every step of an export returns: a new value, and the proof of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from repmlp_deploy.bundle import Hop

__all__ = ["Clock", "Step", "untimed"]

T = TypeVar("T")

Clock = Callable[[str], AbstractContextManager[None]]
"""A context around a part of the work, told its name: it shows progress and takes the time."""


@dataclass(frozen=True)
class Step(Generic[T]):
    """The result of a step.

    Attributes:
        value: what was made; the step's input is unchanged.
        hops: the certificate's rows that prove it.
        notes: what a reader of the report should know.
    """

    value: T
    hops: tuple[Hop, ...] = ()
    notes: tuple[str, ...] = ()


class _Untimed(AbstractContextManager[None]):
    def __exit__(self, *_: object) -> None:
        return None


def untimed(name: str) -> AbstractContextManager[None]:
    """Return a context that shows nothing: a `Clock` for callers without one."""
    del name
    return _Untimed()
