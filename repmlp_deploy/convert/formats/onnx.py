"""The ONNX graph as an artifact: its bytes are the ones that were verified."""

from __future__ import annotations

from repmlp_deploy.convert.job import Artifact, Graphs, Job
from repmlp_deploy.convert.request import Request
from repmlp_deploy.convert.step import Step

__all__ = ["build", "check"]


def check(name: str, request: Request) -> None:
    """Accept every request: what ONNX needs, every export needs."""
    del name, request


def build(name: str, job: Job, source: Graphs) -> Step[Artifact]:
    """Return the lowered graph as `model.onnx`."""
    if source.lowered is None:
        raise AssertionError(f"{name} asks for the lowered graph in FORMATS")
    made = Artifact.of("model.onnx", source.lowered, job.request.precision, source.about, sha256=source.lowered_sha256)
    return Step(made)
