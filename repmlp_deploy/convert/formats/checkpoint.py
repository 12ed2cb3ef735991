"""The merged weights as an artifact, in the layout that they came in."""

from __future__ import annotations

import io
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

from repmlp_deploy.convert.job import Artifact, Job
from repmlp_deploy.convert.reparam.regions import report_of
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
            data, path = safetensors.torch.save(_untied(named)), "model.safetensors"
        else:
            buffer = io.BytesIO()
            torch.save(named, buffer)
            data, path = buffer.getvalue(), "model.pth"
    return Step(Artifact.of(path, data, job.request.precision), notes=_notes(path, source))


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of which no two share memory: safetensors stores none that do."""
    seen: set[int] = set()
    result = {}
    for key, value in state.items():
        storage = value.untyped_storage().data_ptr()
        result[key] = value.clone() if storage in seen else value
        seen.add(storage)
    return result


def _notes(path: str, source: Form) -> tuple[str, ...]:
    """Say what the graphs have merged and the weights have not."""
    report = report_of(source.network)
    if report is None or not report.regions:
        return ()
    return (f"{path} has RepMLP's blocks merged; the regions ({len(report.regions)}) are merged in graphs alone",)
