"""What every step of an export returns: a new value, and the proof of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from repmlp_deploy.bundle import Hop

__all__ = ["Clock", "Step", "Tell", "tell_nobody", "untimed"]

T = TypeVar("T")

Tell = Callable[[int, int], None]
"""Is told how many of how many are done, within a part of the work that takes long."""


def tell_nobody(done: int, total: int) -> None:
    """Be a `Tell` where nobody looks."""
    del done, total


Clock = Callable[[str], AbstractContextManager[Tell]]
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


class _Untimed(AbstractContextManager[Tell]):
    def __enter__(self) -> Tell:
        return tell_nobody

    def __exit__(self, *_: object) -> None:
        return None


def untimed(name: str) -> AbstractContextManager[Tell]:
    """Return a context that shows nothing: a `Clock` for callers without one."""
    del name
    return _Untimed()
