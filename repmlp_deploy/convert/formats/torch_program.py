"""The torch.export program as an artifact."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repmlp_deploy.card import Preprocessing
from repmlp_deploy.convert.graph.export import Traced, trace_network
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
    with job.clock(name):
        traced = source
        if job.request.input == "uint8":
            levels = _OfLevels(source.program.module(), job.preprocessing)
            traced = trace_network(levels, job.interface.examples, job.request.batch)
        hops = job.certifier.require("torch.export program", partial(run_network, traced.program.module()))
        buffer = io.BytesIO()
        torch.export.save(traced.program, buffer)
    return Step(Artifact.of("model.pt2", buffer.getvalue(), job.request.precision), tuple(hops))


class _OfLevels(nn.Module):
    """A network that takes (N, H, W, C) uint8 and normalises it as preprocessing does, to the same bits."""

    def __init__(self, network: nn.Module, how: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.is_bgr = how.colour_order == "BGR"
        self.mean = nn.Buffer(torch.tensor(how.mean).view(-1, 1, 1))
        self.std = nn.Buffer(torch.tensor(how.std).view(-1, 1, 1))

    def forward(self, levels: Tensor) -> Any:
        maps = levels.permute(0, 3, 1, 2).float()
        maps = maps.flip(1) if self.is_bgr else maps
        return self.network((maps - self.mean) / self.std)
