"""Labelled images as an export sees them. What reads them is handed in: it lies on a floor above this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import BatchRange, Manifest
from repmlp_deploy.convert.proof.certificate import Run
from repmlp_deploy.convert.step import Tell
from repmlp_deploy.errors import InputError

__all__ = ["Labelled", "OpenLabelled", "Score", "require_one_class_per_image", "served_run"]

Outputs = Callable[[NDArray[Any]], NDArray[Any]]
"""A batch of the network's input to its output."""


class Labelled(Protocol):
    """Labelled images for one network."""

    source: str
    """Where they are from, for the report."""
    count: int
    """How many there are."""
    warnings: tuple[str, ...]
    """What makes the accuracy on them say less than it seems."""

    def right(self, run: Outputs, tell: Tell) -> int:
        """Return for how many images the largest output is that of the label."""
        ...

    def inputs(self, count: int) -> NDArray[Any]:
        """Return the network's input for at most so many images, evenly spaced: (n, …)."""
        ...


OpenLabelled = Callable[[Manifest, Sequence[Path]], Labelled]
"""Opens labelled images for a network that a manifest describes, and for the calibration's image files, if any."""


@dataclass(frozen=True)
class Score:
    """What an accuracy is made of.

    Attributes:
        right: images whose class was found.
        count: images.
    """

    right: int
    count: int

    @property
    def top1(self) -> float:
        """Share of the images."""
        return self.right / self.count

    def drop_from(self, trained: Score) -> float:
        """Return the percentage points that this is below another score of the same images; negative if above."""
        return 100 * (trained.right - self.right) / self.count


def require_one_class_per_image(manifest: Manifest) -> None:
    """Raise InputError unless images are classified, one class each, from one input."""
    name = manifest.name
    if manifest.task != "classify":
        raise InputError(f"--max-drop measures the top-1 of networks that classify; {name} has task {manifest.task}")
    if manifest.scores == "multi-label":
        raise InputError(f"--max-drop measures one label per image; {name} gives several")
    if len(manifest.inputs) > 1:
        names = ", ".join(spec.name for spec in manifest.inputs)
        raise InputError(f"--max-drop is for networks with one input; {name} takes {names}")


def served_run(run: Run, batch: BatchRange) -> Outputs:
    """Return a run of batches up to the largest that is served; smaller ones than the smallest are filled."""

    def outputs(values: NDArray[Any]) -> NDArray[Any]:
        order = np.arange(max(len(values), batch.min)) % len(values)
        answer = run(values if len(order) == len(values) else values[order])
        first: NDArray[Any] = answer if isinstance(answer, np.ndarray) else answer[0]
        return first[: len(values)]

    return outputs
