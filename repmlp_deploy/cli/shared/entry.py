"""`repmlp COMMAND` and every `repmlp-COMMAND`: where the process starts.

A command's module is loaded only after signals, streams and warnings are set up, so that an interrupted or failed
import ends like every other error: one line on stderr and the right exit code.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import NoReturn

from repmlp_deploy import __version__
from repmlp_deploy.cli.shared import process
from repmlp_deploy.errors import MissingDependency, missing_dependency
from repmlp_deploy.text import printable

__all__ = ["COMMANDS", "STAGES", "main", "run"]

STAGES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "Make a bundle": {
            "inspect": "Describe a checkpoint or a bundle.",
            "export": "Merge a trained network, prove the result, and write a bundle.",
            "build": "Add engines to a bundle, or replace its weights.",
        },
        "Check it": {
            "verify": "Compare a bundle with the trained network on this machine.",
            "eval": "Score a bundle on labelled data.",
            "bench": "Measure latency, memory and multiply-adds in every format.",
        },
        "Run it": {
            "predict": "Run a bundle on images.",
            "serve": "Answer requests over HTTP and gRPC, by the Open Inference Protocol.",
            "map": "Write predictions for any number of images to a parquet file.",
            "pack": "Write a model repository for Triton, OpenVINO or KServe.",
        },
        "This machine": {"doctor": "List what this machine can run and build."},
    }
)
"""What a user does, in this order, to the commands for it and what they do: `cli/NAME.py` has `main`."""

COMMANDS = MappingProxyType({name: about for stage in STAGES.values() for name, about in stage.items()})
"""Command to what it does."""

USAGE = 2


def __getattr__(name: str) -> Callable[[], NoReturn]:
    """Return where the program `repmlp-NAME` starts."""
    if name not in COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(run, name)


def main() -> NoReturn:
    """Run `repmlp COMMAND …`, or print the commands or the version."""
    given = sys.argv[1:]
    if given and given[0] in COMMANDS:
        sys.argv = [f"{_program()} {given[0]}", *given[1:]]
        run(given[0])
    process.prepare_process()
    try:
        code = _answer(given)
    except BaseException as error:  # noqa: BLE001 - see `run`; a completion script loads every command
        _end_import(error)
    raise SystemExit(code)


def _answer(given: list[str]) -> int:
    """Print what was asked for without a command, and return the exit code."""
    if given in (["--version"], ["-V"]):
        return process.write_output(f"repmlp-deploy {__version__}\n")
    if not given or given[0] in {"-h", "--help"}:
        return process.write_output(_help()) or (0 if given else USAGE)
    if given[0] == "--completion":
        return _print_completion(given[1:])
    near = difflib.get_close_matches(given[0][:100], COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
    sys.stderr.write(f"error: no command {printable(given[0], 100)!r}; {hint}\n")
    return USAGE


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


def _print_completion(given: list[str]) -> int:
    """Print the completion script of a shell, and return the exit code."""
    from repmlp_deploy.cli.shared.completion import SHELLS, completion_script  # noqa: PLC0415 - loads every command

    if len(given) != 1 or given[0] not in SHELLS:
        sys.stderr.write(f"error: --completion takes the name of a shell: {', '.join(SHELLS)}\n")
        return USAGE
    return process.write_output(completion_script(given[0]))


def _help() -> str:
    """Return the map of all commands, by what a user does with them."""
    width = max(map(len, COMMANDS))
    lines = [f"Usage: {_program()} COMMAND [OPTIONS]", ""]
    lines += [
        "  From a trained checkpoint to a bundle that is proved equal to it, and from",
        "  there into service.",
        "",
    ]
    for title, stage in STAGES.items():
        lines += [f"{title}:", *(f"  {name:{width}}  {about}" for name, about in stage.items()), ""]
    lines += ["Options:"]
    lines += ["  -V, --version       Print the version and exit."]
    lines += ["  --completion SHELL  Print the completion script for bash, zsh or fish."]
    lines += ["  -h, --help          Show this message and exit.", ""]
    lines += [f"Options and examples of a command: {_program()} COMMAND --help", ""]
    return "\n".join(lines)
