"""Set up the process of a command, and end it when it is told to stop by Ctrl-C, a supervisor or a closed terminal.

The handler raises KeyboardInterrupt, so that `finally` and `with` remove temporary files. Libraries swallow exceptions,
so the handler also remembers the signal, and the next step of the command raises again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import warnings
from typing import NoReturn

from repmlp_deploy.errors import OutputError

__all__ = ["end_interrupted", "prepare_process", "raise_if_stopped", "reader_left", "signal_number", "write_output"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal was closed"}

_received: list[int] = []


def prepare_process() -> None:
    """Catch signals, and keep libraries' warnings and the console's encoding from spoiling a command."""
    _catch_signals()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start: nobody reads it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a console that is not UTF-8 shows escapes
    if "--debug" not in sys.argv and not sys.warnoptions:
        warnings.simplefilter("ignore")
        logging.getLogger().addHandler(logging.NullHandler())  # else Python prints what nobody handles


def _catch_signals() -> None:
    for name in _NAMES:
        if hasattr(signal, name):  # Windows has no SIGHUP
            number = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it on purpose
                signal.signal(number, _stop)


def signal_number() -> int | None:
    """Return the signal that was received, or None."""
    return _received[0] if _received else None


def raise_if_stopped() -> None:
    """Raise again what a library swallowed."""
    if _received:
        raise KeyboardInterrupt


def end_interrupted() -> int:
    """Say that the command was stopped, and return its exit code: 128 and the signal's number."""
    number = signal_number() or signal.SIGINT
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stderr.write(f"error: {_WORDS[signal.Signals(number).name]}\n")
        sys.stderr.flush()
    return 128 + number


def write_output(text: str) -> int:
    """Write all that a process has to say, and return its exit code."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        return reader_left()
    except OSError as error:
        reader_left()  # else Python tries once more at its end, and complains
        sys.stderr.write(f"error: output: {error.strerror or error}\n")
        return OutputError.exit_code
    return 0


def reader_left() -> int:
    """Drop the rest of a report whose reader went away, as `head` does: that is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _stop(number: int, _frame: object) -> NoReturn:
    _received.append(number)
    raise KeyboardInterrupt
