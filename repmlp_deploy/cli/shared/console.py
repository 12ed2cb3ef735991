"""Run a command: exit codes, one-line errors, and tables.

Exit codes: 0 done; 2 unusable arguments or input; 3 verification failed; 4 a dependency or device is missing;
5 output could not be written; 130 interrupted, 143 terminated. Reports go to stdout, everything else to stderr.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from repmlp_deploy.errors import OutputError, RepMLPError, missing_dependency
from repmlp_deploy.text import escape_unsafe, printable

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    missing = missing_dependency(error)
    sys.stderr.write(f"error: {missing or error}\n")
    raise SystemExit(4) from None

from repmlp_deploy.cli.shared.command import as_command
from repmlp_deploy.cli.shared.process import end_interrupted, prepare_process, reader_left, signal_number

__all__ = [
    "INTERRUPTED",
    "print_json",
    "print_line",
    "print_table",
    "print_verdict_line",
    "print_warnings",
    "run_command",
    "typer",
]

INTERRUPTED = 130
USAGE = 2
_WIDE = 130  # characters that the widest table needs


def run_command(command: Callable[..., None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a typer command and end the process: 0, or the error's exit code after one line on stderr."""
    if arguments is None:
        prepare_process()
    given = list(sys.argv[1:] if arguments is None else arguments)
    code = _run(as_command(command), given)
    gc.freeze()  # PyTorch's leftovers end with the process: looking for cycles in it takes a second
    raise SystemExit(code)


def _run(command: Any, arguments: list[str]) -> int:
    try:
        outcome = command.main(arguments, prog_name=Path(sys.argv[0]).name, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        return reader_left()
    except SystemExit as ended:  # what rich and click make of a broken pipe
        if isinstance(ended.__context__, BrokenPipeError):
            return reader_left()
        raise
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 - the last line of defence: a traceback is no message
        code = _failed(error, debug="--debug" in arguments)
        try:
            sys.stdout.flush()
        except OSError:  # Python would try once more at its end, and take another exit code
            reader_left()
        return code
    if outcome == INTERRUPTED:  # what typer makes of an interrupt
        return end_interrupted()
    return outcome if isinstance(outcome, int) else 0


def _failed(error: BaseException, *, debug: bool) -> int:
    """Return the exit code of an error, after its one line on stderr."""
    if isinstance(error, KeyboardInterrupt) or signal_number() is not None:  # libraries turn an interrupt into anything
        return end_interrupted()
    if type(error).__name__ == "Abort":  # what older versions of typer make of an interrupt
        return end_interrupted()
    format_message = getattr(error, "format_message", None)
    if format_message is not None:  # typer's own errors, whichever copy of click they come from
        code, message = USAGE, format_message()
    else:
        code, message = _meaning(error)
        if debug:
            traceback.print_exception(error)
    sys.stderr.write(f"error: {printable(message)}\n")
    return code


def _meaning(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message of an error that is not the command line's."""
    found = missing_dependency(error) if isinstance(error, ImportError) else error
    if isinstance(found, RepMLPError):
        return found.exit_code, str(found)
    if isinstance(error, MemoryError):
        return USAGE, "out of memory: use a smaller batch, image or network"
    if isinstance(error, OSError):
        return OutputError.exit_code, f"{error.filename or 'output'}: {error.strerror or error}"
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return 1, f"{said} (this is a defect: run again with --debug and report it)"


def print_table(  # noqa: PLR0913 - what is shown, and how
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    narrow: Sequence[str] = (),
    stderr: bool = False,
    styles: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print a table.

    Args:
        title: above it.
        columns: their names.
        rows: a cell for every column.
        left: how many columns are text; the others are figures.
        narrow: the columns that a terminal of less than `_WIDE` characters shows; by default all.
        stderr: print it there, because a program reads stdout.
        styles: a cell's text to its style, where the output shows colours.
    """
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = max(160, console.width)
    elif console.width < _WIDE and narrow:
        kept = [i for i, column in enumerate(columns) if column in narrow]
        columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(Text(printable(column)), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell), style=styles.get(cell, "")) for cell in row))
    console.print(table, markup=False, highlight=False)


def print_verdict_line(text: str, *, passed: bool) -> None:
    """Print one line in green or red, where the output shows colours."""
    Console(soft_wrap=True, highlight=False).print(Text(printable(text), style="green" if passed else "bold red"))


def print_line(text: str, *, limit: int | None = None, stderr: bool = False) -> None:
    """Print one line of a report, safe to show whatever it quotes; on stderr if a program reads stdout."""
    stream = sys.stderr if stderr else sys.stdout
    stream.write(f"{printable(text) if limit is None else printable(text, limit)}\n")


def print_warnings(warnings: Sequence[str]) -> None:
    """Print one line per warning on stderr, so that JSON on stdout stays JSON."""
    for warning in warnings:
        sys.stderr.write(f"warning: {printable(warning)}\n")


def print_json(report: Any) -> None:
    """Print one JSON object; it may quote text from files, so characters that a terminal obeys are escaped."""
    sys.stdout.write(escape_unsafe(json.dumps(report, ensure_ascii=False)) + "\n")
