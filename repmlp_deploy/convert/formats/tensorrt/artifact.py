"""TensorRT and TensorRT-RTX engines as artifacts, built from the verified graph."""

from __future__ import annotations

from repmlp_deploy.bundle import GraphRecord
from repmlp_deploy.convert.formats.tensorrt.build import NOT_RUN, GraphSpec, build_engine
from repmlp_deploy.convert.formats.tensorrt.flavours import check_options
from repmlp_deploy.convert.job import Artifact, Graphs, Job
from repmlp_deploy.convert.request import Request
from repmlp_deploy.convert.step import Step

__all__ = ["build", "check"]


def check(name: str, request: Request) -> None:
    """Raise if this machine cannot build an engine with these options."""
    check_options(name, request.engine)


def build(name: str, job: Job, source: Graphs) -> Step[Artifact]:
    """Return the engine's plan as `model.NAME.engine`.

    Raises:
        BuildError: the vendor's parser or builder refuses the graph.
    """
    request = job.request
    with job.clock(name):
        kept = GraphRecord.model_validate(source.about).kept_products()
        spec = GraphSpec(job.interface.shapes(), request.batch, request.precision, kept)
        engine = build_engine(name, source.need_lowered(), spec, request.engine)
    made = Artifact.of(f"model.{name}.engine", engine.plan, request.precision, engine.details)
    return Step(made, notes=(NOT_RUN.format(name),))
