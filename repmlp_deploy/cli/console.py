"""What the commands share: exit codes, one-line errors, tables, and a progress display.

Exit codes: 0 done; 2 unusable arguments or input; 3 verification failed; 4 a dependency or device is missing;
5 output could not be written; 130 interrupted. Reports go to stdout, everything else to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from repmlp_deploy.errors import MissingDependency, OutputError, RepMLPError

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as missing:
    sys.stderr.write(f"error: {MissingDependency(missing.name or 'rich', 'cli')}\n")
    raise SystemExit(MissingDependency.exit_code) from None

__all__ = ["interrupt", "one_line", "print_json", "print_table", "progress", "run_command", "typer"]

INTERRUPTED = 130

_interrupted = threading.Event()


def run_command(command: Callable[..., None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a typer command and end the process: 0, or the error's exit code after one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(command)
    code = _run(app, given)
    gc.freeze()  # what PyTorch leaves behind goes with the process: looking for cycles in it takes a second
    raise SystemExit(code)


def _run(app: typer.Typer, arguments: list[str]) -> int:
    try:
        outcome = typer.main.get_command(app).main(arguments, standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our report went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RepMLPError as error:
        return _fail(str(error), error.exit_code, error)
    except Exception as error:  # noqa: BLE001 - the last line of defence: a traceback is no message
        return _unexpected(error)
    if outcome == INTERRUPTED:  # what typer makes of an interrupt
        return _fail("interrupted", INTERRUPTED)
    return outcome if isinstance(outcome, int) else 0


def _unexpected(error: Exception) -> int:
    """The exit code of what is no error of ours: a usage error of the command line, a full disk, or a defect."""
    format_message = getattr(error, "format_message", None)
    if format_message is not None:  # typer's own errors, whichever copy of click they come from
        return _fail(format_message(), 2)
    if type(error).__name__ == "Abort":  # what older versions of typer make of it
        return _fail("interrupted", INTERRUPTED)
    if isinstance(error, OSError):
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}", OutputError.exit_code, error)
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _fail(f"{said} (this is a defect: run again with --debug and report it)", 1, error)


def _fail(message: str, code: int, error: BaseException | None = None) -> int:
    if error is not None and "--debug" in sys.argv:
        traceback.print_exception(error)
    sys.stderr.write(f"error: {one_line(message)}\n")
    return code


def one_line(text: str) -> str:
    """`text` without line breaks, so that an error is one line whatever it quotes."""
    return " ".join(text.split())


def interrupt(*_: object) -> None:
    """A handler of SIGINT that cannot be lost: libraries swallow exceptions, so the next step raises it again."""
    _interrupted.set()
    raise KeyboardInterrupt


def _stoppable(show: Callable[[str], None]) -> Callable[[str], None]:
    def step(name: str) -> None:
        if _interrupted.is_set():
            raise KeyboardInterrupt
        show(name)

    return step


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A display of the current step on stderr: a spinner on a terminal, a line a step otherwise."""
    console = Console(file=sys.stderr)  # bound now: steps may redirect sys.stderr while they run
    if quiet:
        yield _stoppable(lambda _step: None)
    elif console.is_terminal:
        with console.status("starting") as status:
            yield _stoppable(status.update)
    else:
        stream = sys.stderr
        yield _stoppable(lambda step: print(f"... {step}", file=stream, flush=True))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """A table on stdout; the first `left` columns are text, the others figures."""
    console = Console()
    if not console.is_terminal:
        console.width = max(160, console.width)
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False, highlight=False)


def print_json(report: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
