"""`repmlp-inspect FILE_OR_BUNDLE`: what a checkpoint or a bundle is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.cli.export import print_report
from repmlp_deploy.cli.shared.console import print_json, print_table, run_command, typer
from repmlp_deploy.convert.options import parse_size

__all__ = ["main"]


def main() -> None:
    """Run the command of this process."""
    run_command(inspect_command)


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a bundle's folder.")],
    weights: Annotated[str | None, typer.Option(help="model or ema, where the file holds both.")] = None,
    input_size: Annotated[str | None, typer.Option(metavar="HxW", help="Where shapes cannot tell it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 - read by console
) -> None:
    """Say what a checkpoint or a bundle is: layout, architecture, parameters, hops."""
    if path.is_dir():
        bundle = Bundle.load(path)
        for entry in bundle.files():
            bundle.read(entry)
        if json:
            print_json({"kind": "bundle", **bundle.manifest.as_json()})
        else:
            print_report(bundle)
        return
    report = _describe(path, weights, None if input_size is None else parse_size(input_size))
    if json:
        print_json(report)
        return
    rows = [(key, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for key, v in report.items() if v != ""]
    print_table(str(path), ("what", "value"), rows, left=2)


def _describe(path: Path, weights: str | None, input_size: tuple[int, int] | None) -> dict[str, Any]:
    from repmlp_deploy.convert.source.trained import describe_checkpoint  # noqa: PLC0415 - loads torch

    return describe_checkpoint(path, weights=weights, input_size=input_size)
