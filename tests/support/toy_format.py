"""A toy format: the constants of the verified graph as a NumPy archive."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from repmlp_deploy.convert.graph.run import onnx_run
from repmlp_deploy.convert.job import Artifact, Graphs, Job
from repmlp_deploy.convert.request import Request
from repmlp_deploy.convert.step import Step
from repmlp_deploy.errors import InputError

__all__ = ["build", "check"]


def check(name: str, request: Request) -> None:
    if request.graph != "folded":
        raise InputError(f"{name} holds folded constants, not those of the {request.graph} graph")


def build(name: str, job: Job, source: Graphs) -> Step[Artifact]:
    graph = source.need_fp32()
    model = onnx.load_from_string(graph)
    arrays: dict[str, Any] = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    hops = job.certifier.require(name, onnx_run(graph))
    return Step(Artifact.of(f"model.{name}.npz", buffer.getvalue(), "fp32", {"constants": len(arrays)}), tuple(hops))
