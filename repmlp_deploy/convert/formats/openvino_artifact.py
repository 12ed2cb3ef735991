"""OpenVINO IR as an artifact: built from the float32 graph, verified as its runner runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from repmlp_deploy.convert.formats.candidate import Candidate
from repmlp_deploy.convert.formats.openvino import IR, build_ir, check_precision, quantize_ir
from repmlp_deploy.convert.graph.calibrate import Calibration
from repmlp_deploy.convert.job import Artifact, Graphs, Job
from repmlp_deploy.convert.request import Request
from repmlp_deploy.convert.step import Step
from repmlp_deploy.runtime.openvino.runner import CompiledIR
from repmlp_deploy.runtime.runner import RunnerOptions

__all__ = ["build", "candidates", "check"]


def check(name: str, request: Request) -> None:
    """Raise if OpenVINO cannot store the precision."""
    del name
    check_precision(request.precision, request.low.keep_fp32)


def build(name: str, job: Job, source: Graphs) -> Step[Artifact]:
    """Return the IR as `model.xml` and `model.bin`, verified.

    Raises:
        VerificationError: it differs from the trained network.
    """
    request = job.request
    with job.clock(name):
        ir = build_ir(
            source.need_fp32(),
            precision=request.precision,
            batch=request.batch,
            inputs=job.interface.shapes(),
            calibration=None if job.samples is None else job.samples.feeds(request.fixed_batch or 1),
            keep_fp32=request.low.keep_fp32,
        )
    with job.clock(f"verify {name}"):
        model = CompiledIR(lambda: (ir.xml, ir.weights), request.precision, RunnerOptions())
        hops = job.certifier.require(f"OpenVINO {request.precision}", model.run_all, request.precision, name)
    made = _artifact(ir, model, request.precision)
    stored = "openvino stores fp16 and computes in float32, which is what CPUs have"
    return Step(made, tuple(hops), (stored,) if request.precision == "fp16" else ())


def candidates(job: Job, graph: bytes, samples: Calibration) -> _Candidates:
    """Return what gives the quantized model with some nodes in float32; it is quantized here, once."""
    return _Candidates(job, graph, samples)


class _Candidates:
    """See `Candidates`."""

    def __init__(self, job: Job, data: bytes, samples: Calibration) -> None:
        request = self._request = job.request
        self.step = f"OpenVINO {request.precision}"
        with job.clock("openvino"):
            self._built = quantize_ir(
                data,
                request.precision,
                batch=request.batch,
                inputs=job.interface.shapes(),
                calibration=samples.feeds(request.fixed_batch or 1),
                keep_fp32=request.low.keep_fp32,
            )

    def relevant(self, nodes: Collection[str]) -> frozenset[str]:
        """Return all of them: sums and gates are quantized, too."""
        return frozenset(nodes)

    def build(self, kept: Collection[str]) -> Candidate:
        """Return the IR with these nodes in float32."""
        ir, precision = self._built(kept), self._request.precision
        model = CompiledIR(lambda: (ir.xml, ir.weights), precision, RunnerOptions())

        in_float32 = frozenset(line["node"] for line in ir.details.get("kept_fp32", ()))
        return Candidate(model.run_all, in_float32, lambda more: _artifact(ir, model, precision, more))


def _artifact(ir: IR, model: CompiledIR, precision: str, more: Mapping[str, Any] = MappingProxyType({})) -> Artifact:
    about = {**ir.details, "products": model.products(), **more}
    return Artifact.of("model.xml", ir.xml, precision, about, companions={"model.bin": ir.weights})
