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

__all__ = [
    "COMMANDS",
    "bench",
    "build",
    "doctor",
    "evaluate",
    "export",
    "inspect",
    "main",
    "map_",
    "pack",
    "predict",
    "run",
    "serve",
    "verify",
]

COMMANDS = MappingProxyType(
    {
        "export": "Merge a trained network, prove the result, and write a bundle.",
        "predict": "Run a bundle on images.",
        "verify": "Compare a bundle with the trained network on this machine.",
        "inspect": "Describe a checkpoint or a bundle.",
        "eval": "Score a bundle on labelled data.",
        "map": "Write predictions for any number of images to a parquet file.",
        "serve": "Answer requests over HTTP and gRPC, by the Open Inference Protocol.",
        "pack": "Write a model repository for Triton, OpenVINO or KServe.",
        "build": "Add engines to a bundle, or replace its weights.",
        "bench": "Measure latency, memory and multiply-adds in every format.",
        "doctor": "List what this machine can run and build.",
    }
)
"""Command to what it does: a module of its name in this folder has `main`."""

STAGES = MappingProxyType(
    {
        "Make a bundle": ("inspect", "export", "build"),
        "Check it": ("verify", "eval", "bench"),
        "Run it": ("predict", "serve", "map", "pack"),
        "This machine": ("doctor",),
    }
)
"""What a user does, in this order, to the commands for it; those that this installation has not are left out."""

USAGE = 2


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
    staged = {name for names in STAGES.values() for name in names}
    stages = {**STAGES, "Others": tuple(name for name in COMMANDS if name not in staged)}
    lines = [f"Usage: {_program()} COMMAND [OPTIONS]", ""]
    lines += [
        "  From a trained checkpoint to a bundle that is proved equal to it, and from",
        "  there into service.",
        "",
    ]
    for title, names in stages.items():
        known = [f"  {name:{width}}  {COMMANDS[name]}" for name in names if name in COMMANDS]
        lines += [f"{title}:", *known, ""] if known else []
    lines += ["Options:"]
    lines += ["  -V, --version       Print the version and exit."]
    lines += ["  --completion SHELL  Print the completion script for bash, zsh or fish."]
    lines += ["  -h, --help          Show this message and exit.", ""]
    lines += [f"Options and examples of a command: {_program()} COMMAND --help", ""]
    return "\n".join(lines)


bench = partial(run, "bench")
build = partial(run, "build")
doctor = partial(run, "doctor")
evaluate = partial(run, "eval")
export = partial(run, "export")
inspect = partial(run, "inspect")
map_ = partial(run, "map")
pack = partial(run, "pack")
predict = partial(run, "predict")
serve = partial(run, "serve")
verify = partial(run, "verify")
