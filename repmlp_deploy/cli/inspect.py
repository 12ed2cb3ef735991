"""`repmlp-inspect FILE_OR_BUNDLE`: what a checkpoint or a bundle is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.cli.shared import description as said
from repmlp_deploy.cli.shared import export_options as asked
from repmlp_deploy.cli.shared.bundle_report import print_details, print_sensitivity, print_summary
from repmlp_deploy.cli.shared.console import print_json, print_line, print_table, print_warnings, run_command, typer
from repmlp_deploy.convert.options import parse_size
from repmlp_deploy.errors import CheckpointError, InputError, MissingDependency
from repmlp_deploy.reading import is_folder

__all__ = ["main"]

_NOT_SHOWN = ("regions", "warnings")


def main() -> None:
    """Run the command of this process."""
    run_command(inspect_command)


def inspect_command(  # noqa: PLR0913 - one per option
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a bundle's folder.")],
    module: asked.Module = None,
    model: asked.Model = None,
    card: asked.Card = None,
    weights: asked.Weights = None,
    state_key: asked.StateKey = None,
    ignore: asked.Ignore = None,
    input_size: asked.InputSize = None,
    mean: said.Mean = None,
    std: said.Std = None,
    resize: said.ResizeTo = None,
    crop: said.Crop = None,
    labels: said.Labels = None,
    scores: said.ScoresOf = None,
    write_card: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Write the card, to complete it and pass it as --card.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Describe a checkpoint or a bundle: layout, architecture, parameters, hops."""
    choices: dict[str, Any] = {
        "module": module,
        "model": model,
        "card": card,
        "weights": weights,
        "state_key": state_key,
        "ignore": tuple(ignore or ()),
        "input_size": None if input_size is None else parse_size(input_size),
    }
    description = said.read_description(mean, std, resize, crop, labels, scores)
    if is_folder(path, path):
        _require_none(path, {**choices, **description, "write_card": write_card})
        _print_bundle(Bundle.load(path), as_json=json)
        return
    report = _describe(path, choices, description, write_card)
    print_warnings(report["warnings"])
    if json:
        print_json(report)
        return
    shown = {key: value for key, value in report.items() if value not in ("", None, []) and key not in _NOT_SHOWN}
    rows = [(key, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for key, v in shown.items()]
    print_table(str(path), ("what", "value"), rows, left=2)
    if write_card is not None:
        print_line(f"wrote {write_card}; correct it, and pass it with --card {write_card}")


def _require_none(path: Path, options: dict[str, Any]) -> None:
    """Raise if an option was given that says something about a checkpoint."""
    for name, value in options.items():
        if value not in (None, ()):
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is about a checkpoint; {path} is a folder: leave it out, or give a file")


def _print_bundle(bundle: Bundle, *, as_json: bool) -> None:
    """Check every file of a bundle, and print its description."""
    for entry in bundle.files():
        bundle.read(entry)
    if as_json:
        print_json({"kind": "bundle", **bundle.manifest.as_json()})
    else:
        print_details(bundle)
        print_sensitivity(bundle)
        print_summary(bundle)


def _describe(
    path: Path, choices: dict[str, Any], description: dict[str, Any], write_card: Path | None
) -> dict[str, Any]:
    """Return what the checkpoint is; write its card if that was asked for.

    Raises:
        CheckpointError: it is of no family that is known, and nothing says what makes its network.
        MissingDependency: what makes the network needs a package that is not installed.
    """
    # these load torch
    from repmlp_deploy.convert.rework.describe import describe_trained  # noqa: PLC0415
    from repmlp_deploy.convert.source.card_file import write_card_file  # noqa: PLC0415
    from repmlp_deploy.convert.source.description import Description  # noqa: PLC0415
    from repmlp_deploy.convert.source.opening import open_source  # noqa: PLC0415
    from repmlp_deploy.convert.source.trained import SourceRequest  # noqa: PLC0415

    said = SourceRequest(**choices, described=Description(**description), allow_merged=True)
    is_own = said.module is not None or said.model is not None
    try:
        trained = open_source(path, said)
    except (CheckpointError, MissingDependency):
        found = None if is_own or write_card is not None else _of_another_family(path, said.weights, said.state_key)
        if found is None:
            raise
        return found
    if write_card is not None:
        write_card_file(trained.card, write_card, [warning.partition(". Say ")[0] for warning in trained.warnings])
    return describe_trained(trained)


def _of_another_family(path: Path, weights: str | None, state_key: str | None) -> dict[str, Any] | None:
    """Return what the names in a file say that no RepMLP is in; None if they say nothing."""
    from repmlp_deploy.convert.rework.describe import describe_names  # noqa: PLC0415 - torch

    try:
        return describe_names(path, weights, state_key)
    except CheckpointError:
        return None  # the first reason is the better one
