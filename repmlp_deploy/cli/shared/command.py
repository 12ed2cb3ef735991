"""What every command has in common: groups of options, examples after them, `--debug`, `--quiet` and `--version`.

The groups are one table over all commands, so an option means the same thing and stands at the same place everywhere.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import wraps
from types import MappingProxyType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from repmlp_deploy import __version__
from repmlp_deploy.errors import InputError

__all__ = ["EXAMPLES", "GROUPS", "Command", "as_command", "group_of", "is_quiet"]

WIDEST = 120  # characters: longer lines are hard to read

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Input": (
            "ckpt", "module", "model", "models", "card", "bundle", "data", "column", "suite", "config", "input-size",
            "weights", "state-key", "ignore", "allow-merged", "refit-from",
        ),
        "Images and classes": ("mean", "std", "resize", "crop", "labels", "scores"),
        "Artifacts": ("format", "formats", "graph", "merge", "input", "batch", "opset"),
        "Precision": ("precision", "calibration", "calibration-method", "keep-fp32", "sensitivity", "max-drop", "eval"),
        "TensorRT": (
            "workspace-gb", "tf32", "optimization-level", "timing-cache", "version-compatible", "hardware-compatible",
            "compute-capability", "refittable", "strip-weights", "verbosity",
        ),
        "Running": (
            "device", "threads", "streams", "engine", "workers", "cache", "decode", "check", "fresh", "state",
            "skip-unreadable", "bisect",
        ),
        "Measuring": (
            "seconds", "limit", "baseline", "idle", "end-to-end", "profile", "scenario", "p99", "compare",
            "threshold",
        ),
        "Serving": (
            "watch", "watch-seconds", "control", "host-engine", "replicas", "max-replicas", "replica-requests",
            "replica-cpus", "replica-gpus", "write-ray-config", "host", "port", "grpc-port", "max-delay-ms",
            "target-ms", "queue", "timeout", "drain", "connections", "body-mb", "tls-certificate", "tls-key",
            "log-format", "log-requests",
        ),
        "Output": ("out", "layout", "name", "model-version", "storage", "preprocess", "write-card", "engine-report"),
        "Report": ("top", "details", "json", "csv", "markdown", "html", "debug", "quiet", "version", "help"),
    }
)  # fmt: skip
"""Title of a group to the options in it, without their dashes."""

OTHERS = "Options"

LISTS = ("batch", "compute-capability", "format", "formats", "models", "precision", "scenario")
"""Options that take words separated by commas, in at least one command; in no command a word of them is empty."""

EXAMPLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "export": (
            "repmlp-export --ckpt x.pth",
            "repmlp-export --ckpt x.pth --format onnx,openvino --out artifacts/x",
            "repmlp-export --ckpt x.pth --precision int8 --calibration images/",
            "repmlp-export --ckpt x.pth --module mynet:make --input-size 32x32",
        ),
        "predict": (
            "repmlp-predict artifacts/x cat.jpg",
            "repmlp-predict artifacts/x photos/ --top 3 --json",
        ),
        "verify": (
            "repmlp-verify artifacts/x",
            "repmlp-verify artifacts/x --ckpt x.pth",
        ),
        "inspect": (
            "repmlp-inspect x.pth",
            "repmlp-inspect x.pth --write-card mine.toml",
        ),
        "eval": (
            "repmlp-eval artifacts/x --data labelled/",
            "repmlp-eval artifacts/x --data labelled/ --ckpt x.pth",
        ),
        "map": (
            "repmlp-map artifacts/x --data photos/ --out predictions.parquet",
            "repmlp-map artifacts/x --data shard.tar --out predictions.parquet",
        ),
        "pack": ("repmlp-pack artifacts/x --layout triton --out models/",),
        "build": ("repmlp-build artifacts/x --compute-capability 8.9",),
        "bench": (
            "repmlp-bench --ckpt x.pth --batch 1,8 --html report.html",
            "repmlp-bench --bundle artifacts/x --json now.json",
            "repmlp-bench --bundle artifacts/x --scenario offline,server --p99 50",
        ),
        "serve": (
            "repmlp-serve artifacts/x",
            "repmlp-serve cats=artifacts/x --watch models/ --host 0.0.0.0",
            "repmlp-serve artifacts/x --host-engine ray --replicas 2",
        ),
        "doctor": ("repmlp-doctor",),
    }
)
"""Command to its examples: what follows the options in its help."""


def group_of(option: str) -> str:
    """Return the title of the group that an option, such as `ckpt`, stands in."""
    return next((title for title, names in GROUPS.items() if option in names), OTHERS)


def is_quiet() -> bool:
    """Return whether the command that runs was asked for no progress."""
    return _QUIET.get()


def as_command(function: Callable[..., None]) -> Any:
    """Return the command that a function with annotated parameters describes."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": WIDEST}
    app.command(cls=Command, context_settings=settings)(_with_common_options(function))
    return typer.main.get_command(app)


def _say_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"repmlp-deploy {__version__}\n")
        raise typer.Exit


def _be_quiet(asked: bool) -> None:
    _QUIET.set(asked)


_QUIET = ContextVar("quiet", default=False)

_COMMON = {
    "debug": Annotated[bool, typer.Option("--debug", help="Show tracebacks.")],  # read by console and process
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", callback=_be_quiet, help="Print no progress on stderr.")],
    "version": Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version and exit.")
    ],
}


def _with_common_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return `function` with the options of every command; they have taken effect before it is called."""

    @wraps(function)
    def call(**given: Any) -> None:
        function(**{name: value for name, value in given.items() if name not in _COMMON})

    signature = inspect.signature(function, eval_str=True)
    common = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=annotation)
        for name, annotation in _COMMON.items()
    ]
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *common])  # type: ignore[attr-defined]
    call.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()} | _COMMON
    return call


class Command(TyperCommand):
    """A command whose help has groups of options and examples."""

    def grouped(self, ctx: Any) -> Iterator[tuple[str, list[Any]]]:
        """Yield every group of options that this command has, with its parameters in the order of the function."""
        options = [one for one in self.get_params(ctx) if one.param_type_name == "option"]
        for title in (*GROUPS, OTHERS):
            inside = [one for one in options if group_of(long_name(one)) == title]
            if inside:
                yield title, inside

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            InputError: a list has an empty word.
        """
        for option in (one for one in self.get_params(ctx) if one.param_type_name == "option"):
            value = ctx.params.get(option.name)
            if long_name(option) in LISTS and isinstance(value, str) and not all(map(str.strip, value.split(","))):
                said = "has an empty word: leave out its comma" if "," in value else "names nothing"
                raise InputError(f"--{long_name(option)} is {value!r}, which {said}")
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, and every group of options under its title."""
        arguments = [one.get_help_record(ctx) for one in self.get_params(ctx) if one.param_type_name == "argument"]
        if any(arguments):
            with formatter.section("Arguments"):
                formatter.write_dl([record for record in arguments if record])
        for title, options in self.grouped(ctx):
            with formatter.section(title):
                formatter.write_dl([record for one in options if (record := one.get_help_record(ctx))])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - the base class's signature
        """Write the examples, each on a line of its own."""
        lines = EXAMPLES.get((self.callback.__name__ if self.callback else "").removesuffix("_command"), ())
        if lines:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in lines))


def long_name(option: Any) -> str:
    """Return the long name of an option without its dashes: `--keep-fp32` is `keep-fp32`."""
    return str(next(name for name in option.opts if name.startswith("--"))).removeprefix("--")
