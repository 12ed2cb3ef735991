"""The merged weights as an artifact, in the layout that they came in."""

from __future__ import annotations

import io

import safetensors.torch
import torch

from repmlp_deploy.convert.job import Artifact, Job
from repmlp_deploy.convert.request import Request
from repmlp_deploy.convert.source.state_dict import to_layout
from repmlp_deploy.convert.step import Step
from repmlp_deploy.convert.transform import Form
from repmlp_deploy.nets.flat import Flat

__all__ = ["build", "check"]


def check(name: str, request: Request) -> None:
    """Accept every request: an export needs PyTorch in any case."""
    del name, request


def build(name: str, job: Job, source: Form) -> Step[Artifact]:
    """Return the merged state dict as `model.pth`, or `model.safetensors` if it came as one."""
    with job.clock(name):
        network = source.merged.module if isinstance(source.merged, Flat) else source.merged
        state = {key: value.contiguous() for key, value in network.state_dict().items()}
        trained = job.trained
        named = state if trained.state is None else to_layout(state, trained.state)
        if trained.checkpoint is not None and trained.checkpoint.path.suffix == ".safetensors":
            return Step(Artifact.of("model.safetensors", safetensors.torch.save(named), job.request.precision))
        buffer = io.BytesIO()
        torch.save(named, buffer)
        return Step(Artifact.of("model.pth", buffer.getvalue(), job.request.precision))
