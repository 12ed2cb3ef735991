"""The torch.export program as an artifact."""

from __future__ import annotations

import io
from functools import partial

import torch

from repmlp_deploy.convert.graph.export import Traced
from repmlp_deploy.convert.job import Artifact, Job
from repmlp_deploy.convert.proof.probe import run_network
from repmlp_deploy.convert.request import Request
from repmlp_deploy.convert.step import Step

__all__ = ["build", "check"]


def check(name: str, request: Request) -> None:
    """Accept every request: an export needs PyTorch in any case."""
    del name, request


def build(name: str, job: Job, source: Traced) -> Step[Artifact]:
    """Return the traced program as `model.pt2`, verified.

    Raises:
        VerificationError: it differs from the trained network.
    """
    del name
    with job.clock("torch program"):
        hops = job.certifier.require("torch.export program", partial(run_network, source.program.module()))
        buffer = io.BytesIO()
        torch.export.save(source.program, buffer)
    return Step(Artifact.of("model.pt2", buffer.getvalue(), job.request.precision), tuple(hops))
