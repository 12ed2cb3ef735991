"""The ONNX graph as an artifact: its bytes are the ones that were verified."""

from __future__ import annotations

import glob
from collections.abc import Collection, Mapping
from typing import Any

import onnx

from repmlp_deploy.convert.formats.candidate import BY_ACCURACY, Candidate
from repmlp_deploy.convert.graph.calibrate import Calibration, measure_ranges
from repmlp_deploy.convert.graph.lowering.lower import PRODUCTS, product_tensors, set_precision
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.graph.run import onnx_run
from repmlp_deploy.convert.job import Artifact, Graphs, Job
from repmlp_deploy.convert.request import Request
from repmlp_deploy.convert.step import Step

__all__ = ["build", "candidates", "check"]


def check(name: str, request: Request) -> None:
    """Accept every request: what ONNX needs, every export needs."""
    del name, request


def build(name: str, job: Job, source: Graphs) -> Step[Artifact]:
    """Return the lowered graph as `model.onnx`."""
    del name
    graph, precision = source.need_lowered(), job.request.precision
    return Step(Artifact.of("model.onnx", graph, precision, source.about, sha256=source.lowered_sha256))


def candidates(job: Job, graph: bytes, samples: Calibration) -> _Candidates:
    """Return what lowers the float32 graph with some nodes kept; the ranges are measured here, once."""
    return _Candidates(job, graph, samples)


class _Candidates:
    """See `Candidates`."""

    def __init__(self, job: Job, data: bytes, samples: Calibration) -> None:
        self._request, self._model = job.request, onnx.load_from_string(data)
        self.step = f"{job.request.precision} ONNX"
        self._products = {node.name for node in self._model.graph.node if node.op_type in PRODUCTS}
        method = job.request.low.method
        with job.clock("calibrate") as tell:
            tensors, fixed = product_tensors(self._model), job.request.fixed_batch or 1
            self._ranges = measure_ranges(data, samples, tensors, method, tell, batch=fixed)
        self._about = {"calibration": {"method": method, "samples": len(samples)}}

    def relevant(self, nodes: Collection[str]) -> frozenset[str]:
        """Return the products among the nodes: everything else is in float32 in any case."""
        return frozenset(self._products.intersection(nodes))

    def build(self, kept: Collection[str]) -> Candidate:
        """Return the graph with these nodes in float32."""
        precision, own = self._request.precision, self.relevant(kept)
        patterns = (*self._request.low.keep_fp32, *map(glob.escape, sorted(own)))
        lowered = set_precision(self._model, precision, ranges=self._ranges, keep_fp32=patterns)
        data = serialize_model(lowered.model)
        described = lowered.describe()
        for line in described["kept_fp32"]:
            if line.get("node") in own:
                line["reason"] = BY_ACCURACY
        about = {**self._about, "opset": lowered.model.opset_import[0].version, **described}

        def artifact(more: Mapping[str, Any]) -> Artifact:
            return Artifact.of("model.onnx", data, precision, about | dict(more))

        return Candidate(onnx_run(data), frozenset(k.node for k in lowered.kept if k.op in PRODUCTS), artifact)
