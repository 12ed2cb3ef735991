"""`repmlp COMMAND` and every `repmlp-COMMAND`: where the process starts.

A command's module is loaded only after signals, streams and warnings are set up, so that an interrupted or failed
import ends like every other error: one line on stderr and the right exit code.
"""

from __future__ import annotations

import difflib
import os
import sys
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import NoReturn

from repmlp_deploy import __version__
from repmlp_deploy.cli.shared import process
from repmlp_deploy.errors import MissingDependency, missing_dependency
from repmlp_deploy.text import printable

__all__ = ["COMMANDS", "bench", "build", "doctor", "evaluate", "export", "inspect", "main", "predict", "run", "verify"]

COMMANDS = MappingProxyType(
    {
        "export": "Merge a trained network, prove the result equal to it, and write a bundle.",
        "predict": "Run a bundle on images.",
        "verify": "Check a bundle against the trained network's outputs on this machine.",
        "inspect": "Describe a checkpoint or a bundle.",
        "eval": "Score a bundle on labelled data.",
        "build": "Add engines to a bundle, or replace its weights.",
        "bench": "Measure latency, memory and multiply-adds in every format.",
        "doctor": "List what this machine can run and build.",
    }
)
"""Command to what it does: a module of its name in this folder has `main`."""

USAGE = 2


def main() -> NoReturn:
    """Run `repmlp COMMAND …`, or print the commands or the version."""
    given = sys.argv[1:]
    if given and given[0] in COMMANDS:
        sys.argv = [f"{_program()} {given[0]}", *given[1:]]
        run(given[0])
    if given in (["--version"], ["-V"]):
        sys.stdout.write(f"repmlp-deploy {__version__}\n")
        raise SystemExit(0)
    if not given or given[0] in {"-h", "--help"}:
        sys.stdout.write(_help())
        raise SystemExit(0 if given else USAGE)
    near = difflib.get_close_matches(given[0][:100], COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
    sys.stderr.write(f"error: no command {printable(given[0], 100)!r}; {hint}\n")
    raise SystemExit(USAGE)


def run(name: str) -> NoReturn:
    """Run one command and end the process with its exit code."""
    process.prepare_process()
    try:
        command = import_module(f"repmlp_deploy.cli.{name}")
    except BaseException as error:  # noqa: BLE001 - a library may turn an interruption into anything
        _end_import(error)
    command.main()
    raise SystemExit(0)


def _end_import(error: BaseException) -> NoReturn:
    """End the process after a failed import of a command."""
    if process.signal_number() is not None or isinstance(error, KeyboardInterrupt):
        raise SystemExit(process.end_interrupted())
    found = missing_dependency(error) if isinstance(error, ImportError) else None
    if found is None:
        raise error
    sys.stderr.write(f"error: {printable(found)}\n")
    raise SystemExit(MissingDependency.exit_code)


def _program() -> str:
    name = os.path.basename(sys.argv[0])  # noqa: PTH119 - pathlib is not needed otherwise
    return "python -m repmlp_deploy" if name == "__main__.py" else name


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    usage = f"Usage: {_program()} COMMAND [OPTIONS]\n       {_program()} COMMAND --help | --version"
    return "\n".join([usage, "", "Commands:", *lines, ""])


bench = partial(run, "bench")
build = partial(run, "build")
doctor = partial(run, "doctor")
evaluate = partial(run, "eval")
export = partial(run, "export")
inspect = partial(run, "inspect")
predict = partial(run, "predict")
verify = partial(run, "verify")
