"""Artifacts of one graph with other nodes in float32: what a format offers where accuracy decides how many stay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from repmlp_deploy.convert.job import Artifact
from repmlp_deploy.convert.proof.certificate import Run

__all__ = ["BY_ACCURACY", "Candidate", "Candidates"]

BY_ACCURACY = "kept for --max-drop"


@dataclass(frozen=True)
class Candidate:
    """An artifact in the low precision, with some nodes in float32.

    Attributes:
        run: inputs by position to the outputs, as its runner runs it.
        in_float32: names of the products that compute in float32, whatever the reason.
        artifact: makes it an artifact of the bundle, which also says what is given here.
    """

    run: Run
    in_float32: frozenset[str]
    artifact: Callable[[Mapping[str, Any]], Artifact]


class Candidates(Protocol):
    """Builds the candidates of one format from one float32 graph; what they share is computed once."""

    step: str
    """The name of the certificate's rows."""

    def relevant(self, nodes: Collection[str]) -> frozenset[str]:
        """Return those of the nodes, by their names in the ONNX graph, that make a difference."""
        ...

    def build(self, kept: Collection[str]) -> Candidate:
        """Return the artifact with these nodes in float32, besides those that --keep-fp32 names."""
        ...
