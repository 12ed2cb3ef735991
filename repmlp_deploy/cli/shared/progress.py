"""How far a command is, on stderr: steps with the time left on a terminal, plain lines elsewhere, nothing if quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import ParamSpec

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from repmlp_deploy.cli.shared.command import is_quiet
from repmlp_deploy.cli.shared.process import raise_if_stopped
from repmlp_deploy.convert.formats import FORMATS
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.text import printable

__all__ = ["PHASES", "Phases", "counting", "progress", "spoken"]

_P = ParamSpec("_P")

PHASES = ("load", "probe", "merge", "trace", "artifacts", "save")
"""The first step of every phase, in their order. What comes between belongs to the phase that has begun."""

_BEGINS = {step: number for number, step in enumerate(PHASES, 1)} | {
    "read calibration": 2,
    "fold": 3,
    "merge regions": 3,
}

_SHARES = MappingProxyType({"load": 5, "probe": 20, "merge": 30, "trace": 35, "calibrate": 30, "save": 1})
"""Part of an export to its usual share of the time. An artifact has its own; ONNX is made by tracing."""

_ARTIFACT, _QUANTIZED_ARTIFACT, _ENGINE = 10, 60, 40
_LINE_SECONDS = 30.0  # between two lines where there is no terminal


@contextmanager
def progress(
    *, quiet: bool = False, left: Callable[[], float | None] = lambda: None
) -> Iterator[Callable[[str], None]]:
    """Show the current step on stderr: one line that changes on a terminal, one line per step otherwise.

    Args:
        quiet: show nothing, as `--quiet` does.
        left: returns the seconds left, or None as long as nobody can know; asked several times a second on a terminal,
            and nowhere else.
    """
    console = Console(file=sys.stderr)  # bound now: steps may redirect sys.stderr while they run
    if quiet or is_quiet():
        yield _stoppable(lambda _step: None)
    elif console.is_terminal:
        with console.status("starting") as status:
            yield _stoppable(lambda step: status.update(_Line(printable(step), left)))
    else:
        stream = sys.stderr
        yield _stoppable(lambda step: print(f"... {printable(step)}", file=stream, flush=True))


class _Line:
    """A step with the time left, made anew whenever the terminal's line is."""

    def __init__(self, step: str, left: Callable[[], float | None]) -> None:
        self._step, self._left = step, left

    def __rich__(self) -> Text:
        seconds = self._left()
        said = self._step if seconds is None else f"{self._step}, {spoken(seconds)} left"
        return Text(said, no_wrap=True, overflow="ellipsis")


def _stoppable(show: Callable[_P, None]) -> Callable[_P, None]:
    """Return `show` so that it first raises an interruption that a library swallowed."""

    def step(*about: _P.args, **more: _P.kwargs) -> None:
        raise_if_stopped()
        show(*about, **more)

    return step


def spoken(seconds: float) -> str:
    """Return a time as an estimate is said: `a few seconds`, `about 40 s`, `about 3 min`."""
    if seconds < 8:  # noqa: PLR2004 - what rounds to 10 s begins here
        return "a few seconds"
    if seconds < 95:  # noqa: PLR2004 - a minute and a half
        return f"about {round(seconds / 10) * 10} s"
    return f"about {round(seconds / 60)} min"


class Phases:
    """The phases of an export: numbers its steps, and estimates the time left.

    The estimate takes the time so far for the usual share of what is done. So it is rough, and becomes better.
    """

    def __init__(
        self, formats: Sequence[str], precision: str = "fp32", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare for an export.

        Args:
            formats: that are made; the first of those that are made last begins the artifacts.
            precision: of the artifacts.
            clock: returns seconds.
        """
        self._last, self._clock = _made_last(formats), clock
        self._shares = _shares(formats, precision)
        self._phase, self._part = 1, "load"
        self._begun = self._part_begun = clock()

    def number(self, step: str) -> str:
        """Return a step that begins with the number of its phase, as `3 of 6: verify merged`."""
        if step in self._last:
            self._phase = _BEGINS["artifacts"]
        self._phase = max(self._phase, _BEGINS.get(step, 0))
        part = step if step in self._shares else PHASES[_BEGINS.get(step, 1) - 1]
        parts = list(self._shares)
        if part in self._shares and parts.index(part) > parts.index(self._part):
            self._part, self._part_begun = part, self._clock()
        return f"{self._phase} of {len(PHASES)}: {step}"

    def seconds_left(self) -> float | None:
        """Return an estimate of the seconds left; None before the first part is done."""
        parts, shares = list(self._shares), list(self._shares.values())
        index = parts.index(self._part)
        done, later = sum(shares[:index]), sum(shares[index + 1 :])
        if not done:
            return None
        a_share = (self._part_begun - self._begun) / done
        of_this = a_share * shares[index] - (self._clock() - self._part_begun)
        return max(0.0, of_this) + a_share * later


def _made_last(formats: Sequence[str]) -> list[str]:
    """Return the formats that are made of the ONNX graph; if there are none, those of the traced network."""
    of_graph = [name for name in formats if FORMATS[name].needs in ("fp32", "lowered")]
    return of_graph or [name for name in formats if FORMATS[name].needs == "trace"]


def _shares(formats: Sequence[str], precision: str) -> dict[str, int]:
    """Return the parts of an export in their order, each with its share of the time."""
    quantized = PRECISIONS[precision].needs_calibration
    shares = {name: _SHARES[name] for name in ("load", "probe", "merge", "trace")}
    if quantized:
        shares["calibrate"] = _SHARES["calibrate"]
    for name in _made_last(formats):
        if FORMATS[name].engine:
            shares[name] = _ENGINE
        elif name != "onnx":
            shares[name] = _QUANTIZED_ARTIFACT if quantized else _ARTIFACT
    return shares | {"save": _SHARES["save"]}


@contextmanager
def counting() -> Iterator[Callable[[int, int, str], None]]:
    """Show how many of a known number are done, and what else is known.

    A terminal shows a bar with the time left. Elsewhere, a line is written every half minute.
    """
    console = Console(file=sys.stderr)
    if is_quiet():
        yield _stoppable(lambda _done, _total, _what: None)
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=console, transient=True) as bar:
            task = bar.add_task("reading", total=None)

            def show(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, description=printable(what))

            yield _stoppable(show)
    else:
        yield _stoppable(_Lines())


class _Lines:
    """Writes a line every half minute, with the time left at the rate so far."""

    def __init__(self) -> None:
        self._begun = self._told = time.monotonic()
        self._before: int | None = None  # what an earlier run had done

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        self._before = done if self._before is None else self._before
        if now - self._told < _LINE_SECONDS or done == self._before:
            return
        self._told = now
        seconds = (total - done) * (now - self._begun) / (done - self._before)
        sys.stderr.write(f"... {done} of {total}, {spoken(seconds)} left: {printable(what)}\n")
