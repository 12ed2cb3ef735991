"""The options that say how a network takes images and what its classes are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from repmlp_deploy.card import Resize, read_labels
from repmlp_deploy.cli.shared.console import typer
from repmlp_deploy.convert.options import SCORES, parse_crop, parse_levels, parse_resize, require_choice

__all__ = ["Crop", "Labels", "Mean", "ResizeTo", "ScoresOf", "Std", "read_description"]

Mean = Annotated[str | None, typer.Option(metavar="R,G,B", help="Mean of the training images, in levels 0 to 255.")]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help="Their standard deviation, in levels 0 to 255.")]
ResizeTo = Annotated[str | None, typer.Option("--resize", metavar="HxW|SHORT|none", help="How images are resized.")]
Crop = Annotated[str | None, typer.Option(metavar="HxW|none", help="Centre that is cut out after resizing.")]
Labels = Annotated[Path | None, typer.Option(metavar="FILE", help="Class names, one per line, in the logits' order.")]
ScoresOf = Annotated[str | None, typer.Option("--scores", help=f"How logits become scores: {', '.join(SCORES)}.")]


def read_description(  # noqa: PLR0913 - one per option
    mean: str | None, std: str | None, resize: str | None, crop: str | None, labels: Path | None, scores: str | None
) -> dict[str, Any]:
    """Return what was said, for `Description`.

    Raises:
        InputError: an option is not of its form, or the labels cannot be read.
    """
    said: dict[str, Any] = {}
    if mean is not None:
        said["mean"] = parse_levels("--mean", mean)
    if std is not None:
        said["std"] = parse_levels("--std", std)
    if resize is not None:
        mode, size = parse_resize(resize)
        said["resize"] = Resize.model_validate({"mode": mode, "size": size}) if mode != "none" else mode
    if crop is not None:
        said["crop"] = parse_crop(crop)
    if labels is not None:
        said["labels"] = read_labels(labels)
    if scores is not None:
        require_choice("--scores", scores, SCORES)
        said["scores"] = scores
    return said
