"""OpenVINO IR as an artifact: built from the float32 graph, verified as its runner runs it."""

from __future__ import annotations

from repmlp_deploy.convert.formats.openvino import build_ir, check_precision
from repmlp_deploy.convert.job import Artifact, Graphs, Job
from repmlp_deploy.convert.request import Request
from repmlp_deploy.convert.step import Step
from repmlp_deploy.runtime.openvino.runner import CompiledIR
from repmlp_deploy.runtime.runner import RunnerOptions

__all__ = ["build", "check"]


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
            calibration=None if job.samples is None else job.samples.feeds(),
            keep_fp32=request.low.keep_fp32,
        )
    with job.clock(f"verify {name}"):
        model = CompiledIR(lambda: (ir.xml, ir.weights), request.precision, RunnerOptions())
        hops = job.certifier.require(f"OpenVINO {request.precision}", model.run_all, request.precision, name)
    about = {**ir.details, "products": model.products()}
    made = Artifact.of("model.xml", ir.xml, request.precision, about, companions={"model.bin": ir.weights})
    stored = "openvino stores fp16 and computes in float32, which is what CPUs have"
    return Step(made, tuple(hops), (stored,) if request.precision == "fp16" else ())
