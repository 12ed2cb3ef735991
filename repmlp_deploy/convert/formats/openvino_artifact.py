"""OpenVINO IR as an artifact: built from the float32 graph, verified as its runner runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from repmlp_deploy.convert.formats.candidate import Candidate
from repmlp_deploy.convert.formats.openvino import build_ir, check_precision, quantize_ir
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
    if source.fp32 is None:
        raise AssertionError(f"{name} asks for the float32 graph in FORMATS")
    request = job.request
    with job.clock(name):
        ir = build_ir(
            source.fp32,
            precision=request.precision,
            batch=request.batch,
            inputs=job.interface.shapes(),
            calibration=None if job.samples is None else job.samples.feeds(request.fixed_batch or 1),
            keep_fp32=request.low.keep_fp32,
        )
    with job.clock(f"verify {name}"):
        model = CompiledIR(lambda: (ir.xml, ir.weights), request.precision, RunnerOptions())
        hops = job.certifier.require(f"OpenVINO {request.precision}", model.run_all, request.precision, name)
    about = {**ir.details, "products": model.products()}
    made = Artifact.of("model.xml", ir.xml, request.precision, about, companions={"model.bin": ir.weights})
    stored = "openvino stores fp16 and computes in float32, which is what CPUs have"
    return Step(made, tuple(hops), (stored,) if request.precision == "fp16" else ())


def candidates(job: Job, source: Graphs) -> _Candidates:
    """Return what gives the quantized model with some nodes in float32; it is quantized here, once."""
    if source.fp32 is None:
        raise AssertionError("candidates are made of the float32 graph")
    return _Candidates(job, source.fp32)


class _Candidates:
    """See `Candidates`."""

    def __init__(self, job: Job, data: bytes) -> None:
        if job.samples is None:
            raise AssertionError("Request.check asks for calibration samples")
        request = self._request = job.request
        self.step = f"OpenVINO {request.precision}"
        with job.clock("openvino"):
            self._built = quantize_ir(
                data,
                request.precision,
                batch=request.batch,
                inputs=job.interface.shapes(),
                calibration=job.samples.feeds(request.fixed_batch or 1),
                keep_fp32=request.low.keep_fp32,
            )

    def relevant(self, nodes: Collection[str]) -> frozenset[str]:
        """Return all of them: sums and gates are quantized, too."""
        return frozenset(nodes)

    def build(self, kept: Collection[str]) -> Candidate:
        """Return the IR with these nodes in float32."""
        ir, precision = self._built(kept), self._request.precision
        model = CompiledIR(lambda: (ir.xml, ir.weights), precision, RunnerOptions())

        def artifact(more: Mapping[str, Any]) -> Artifact:
            about = {**ir.details, "products": model.products(), **more}
            return Artifact.of("model.xml", ir.xml, precision, about, companions={"model.bin": ir.weights})

        in_float32 = frozenset(line["node"] for line in ir.details.get("kept_fp32", ()))
        return Candidate(model.run_all, in_float32, artifact)
