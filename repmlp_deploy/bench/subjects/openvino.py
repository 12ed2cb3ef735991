"""OpenVINO: the bundle's artifact in its runner, exactly as `Predictor` runs it, with the plugin's own times."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bench.counting.counts import stage_of
from repmlp_deploy.bench.measure.results import ProfileLine
from repmlp_deploy.bench.subjects.table import Job
from repmlp_deploy.bundle import Bundle
from repmlp_deploy.errors import InputError, MissingDependency
from repmlp_deploy.runtime.openvino.runner import CompiledIR, OpenVinoRunner, layer_info
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.slices import slices_of

try:
    import openvino as ov
except ImportError:
    raise MissingDependency("openvino", "openvino") from None

__all__ = ["IRSubject", "open_ir"]

_IN_FRONT_OF_WEIGHTS = ("Convert", "FakeQuantize", "Multiply", "Reshape", "Subtract")


def open_ir(job: Job) -> IRSubject:
    """Compile the job's artifact."""
    if job.bundle is None:
        raise InputError(f"{job.format} needs a bundle")
    return IRSubject(Bundle.load(job.bundle), job)


class IRSubject:
    """A compiled model."""

    def __init__(self, bundle: Bundle, job: Job) -> None:
        self._entry = bundle.artifact(OpenVinoRunner.format)
        self._bundle, self._job = bundle, job
        self._runner = OpenVinoRunner(bundle, job.runner_options("cpu"))
        self.proof: dict[str, Any] = {
            **self._runner.details,
            "device": self._runner.device,
            "dtype": self._entry.precision,
            "products": self._runner.products(),
            "sha256": self._entry.sha256,
        }

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch: (N, C, H, W) float32 -> (N, classes) float32, an array the caller owns."""
        return self._runner.run(batch)

    def device_ms(self, batch: NDArray[np.float32], calls: int) -> None:
        """Return nothing: a CPU has no clock of its own."""
        del batch, calls

    def profile(self, batch: NDArray[np.float32], calls: int) -> list[ProfileLine]:
        """Return milliseconds per call from OpenVINO's performance counters, in a model of its own."""
        from repmlp_deploy.bench.measure.profiling import (  # noqa: PLC0415 - onnx is no part of what is measured
            gather_times,
            profile_lines,
        )

        files = self._bundle.read(self._entry), self._bundle.read(self._entry.companions[0])
        options = RunnerOptions("cpu", self._job.threads)
        compiled = CompiledIR(lambda: files, self._entry.precision, options, more={"PERF_COUNT": True}).compiled
        nodes = compiled.get_runtime_model().get_ordered_ops()
        origins = {node.get_friendly_name(): layer_info(node, "originalLayersNames") for node in nodes}
        request = compiled.create_infer_request()
        parts = list(slices_of([batch], self._bundle.manifest.batch))
        request.infer(parts[0])
        times = []
        for part in parts * calls:
            request.infer(part)
            for node in request.profiling_info:
                ms = node.real_time.total_seconds() * 1e3
                if ms > 0:
                    times.append((origins.get(node.node_name) or node.node_name, node.node_type, ms))
        stages = _node_stages(ov.Core().read_model(*files))
        return profile_lines(gather_times(times, stages, calls), self._job.format, self._job.precision)


def _node_stages(model: Any) -> dict[str, str]:
    """Name of every node to the stage whose weights it, or the last node before it that has any, reads."""
    stages: dict[str, str] = {}
    stage = "input"
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant":
            continue
        found = [known for port in node.inputs() if (known := stage_of(_weights_name(port)))]
        stage = found[0] if found else stage
        stages[node.get_friendly_name()] = stage
    return stages


def _weights_name(port: Any) -> str:
    """Return the name of the constant that an input reads through decompression or dequantization; empty for none."""
    node = port.get_source_output().get_node()
    while node.get_type_name() in _IN_FRONT_OF_WEIGHTS:
        node = node.input_value(0).get_node()
    return str(node.get_friendly_name()) if node.get_type_name() == "Constant" else ""
