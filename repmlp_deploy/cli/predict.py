"""`repmlp-predict BUNDLE IMAGE…`: what a bundle says of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from repmlp_deploy.cli.console import print_json, print_table, run_command, typer
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.predictor import Predictor

__all__ = ["main"]


def main() -> None:
    """Entry point."""
    run_command(predict_command)


def predict_command(  # noqa: PLR0913 - one an option
    bundle: Annotated[Path, typer.Argument(help="The folder that repmlp-export wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    artifact: Annotated[str | None, typer.Option("--format", help="Artifact; default: the best here.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the best here.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference.")] = None,
    top: Annotated[int, typer.Option(help="Classes to show.")] = 1,
    check: Annotated[bool, typer.Option("--check", help="Run the probe first; exit 3 if it fails.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 - read by console
) -> None:
    """Predict the classes of images with an exported bundle."""
    if top < 1:
        raise InputError(f"--top is {top}; it must be at least 1")
    with Predictor(bundle, format=artifact, device=device, threads=threads) as predictor:
        if check:
            predictor.self_check()
        predictions = predictor(images)
        labels = predictor.labels
        title = f"{predictor.manifest.name}, {predictor.format} on {predictor.device}"
    tops = [
        [(str(label) if labels is None else labels[label], label, score) for label, score in prediction.top(top)]
        for prediction in predictions
    ]
    if json:
        found = [
            {
                "image": str(path),
                "top": [{"label": label, "class": name, "score": score} for name, label, score in best],
            }
            for path, best in zip(images, tops, strict=True)
        ]
        print_json(
            {"bundle": str(bundle), "format": predictor.format, "device": predictor.device, "predictions": found}
        )
        return
    rows = [
        (str(path), name, f"{score:.4f}") for path, best in zip(images, tops, strict=True) for name, _, score in best
    ]
    print_table(title, ("image", "class", "score"), rows, left=2)
