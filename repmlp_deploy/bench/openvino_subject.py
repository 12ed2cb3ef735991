"""OpenVINO: the bundle's ONNX graph compiled for the CPU, in a precision that is asked for and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bench.results import ProfileLine
from repmlp_deploy.bench.subjects import Job
from repmlp_deploy.bundle import Bundle
from repmlp_deploy.errors import InputError, MissingDependency, MissingDevice

try:
    import openvino as ov
except ImportError:
    raise MissingDependency("openvino", "openvino") from None

__all__ = ["GraphSubject", "open_graph"]

HINTS = {"fp32": "f32", "bf16": "bf16"}
"""Precision to OpenVINO's name of it. Without a hint OpenVINO takes bf16 wherever the CPU has it."""

_CAPABILITIES = {"fp32": "FP32", "bf16": "BF16"}


def open_graph(job: Job) -> GraphSubject:
    """The job's graph, compiled."""
    if job.bundle is None:
        raise InputError(f"{job.format} needs a bundle")
    return GraphSubject(Bundle.load(job.bundle), job)


class GraphSubject:
    """A compiled graph and one infer request."""

    def __init__(self, bundle: Bundle, job: Job) -> None:
        entry = bundle.artifact("onnx")
        bundle.read(entry)  # its SHA-256
        if bundle.folder is None:
            raise InputError("the bundle is not on disk")
        self._job = job
        self._file = bundle.folder / entry.path
        self._core = ov.Core()
        able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if _CAPABILITIES[job.precision] not in able:
            raise MissingDevice(f"this CPU has no {job.precision} instructions; OpenVINO names {', '.join(able)}")
        compiled = self._compile({})
        hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if hint != HINTS[job.precision]:
            raise MissingDevice(f"OpenVINO was asked for {HINTS[job.precision]} and answers {hint}")
        self._request = compiled.create_infer_request()
        self.proof: dict[str, Any] = {
            "runtime": f"openvino {ov.__version__}",
            "device": ", ".join(compiled.get_property("EXECUTION_DEVICES")),
            "dtype": hint,
            "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
            "streams": compiled.get_property("NUM_STREAMS"),
            "products": _product_types(compiled),
            "sha256": entry.sha256,
        }

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, C, H, W) float32 -> (N, classes) float32, an array the caller owns."""
        self._request.infer([batch], share_inputs=True)
        output: NDArray[np.float32] = self._request.get_output_tensor(0).data.copy()
        return output

    def profile(self, batch: NDArray[np.float32], calls: int) -> list[ProfileLine]:
        """Milliseconds a call as OpenVINO's performance counters tell them, in a request of its own."""
        from repmlp_deploy.bench.profiling import (  # noqa: PLC0415 - onnx is no part of what is measured
            gather_times,
            node_stages,
            profile_lines,
        )

        compiled = self._compile({"PERF_COUNT": True})
        origins = {node.get_friendly_name(): _info(node, "originalLayersNames") for node in _nodes(compiled)}
        request = compiled.create_infer_request()
        request.infer([batch])
        nodes = []
        for _ in range(calls):
            request.infer([batch])
            for node in request.profiling_info:
                ms = node.real_time.total_seconds() * 1e3
                if ms > 0:
                    names = origins.get(node.node_name) or node.node_name
                    nodes.append((names, node.node_type, ms))
        times = gather_times(nodes, node_stages(self._file), calls)
        return profile_lines(times, self._job.format, self._job.precision)

    def _compile(self, more: dict[str, Any]) -> Any:
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[self._job.precision],
            "INFERENCE_NUM_THREADS": self._job.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            **more,
        }
        return self._core.compile_model(str(Path(self._file)), "CPU", settings)


def _nodes(compiled: Any) -> Any:
    return compiled.get_runtime_model().get_ordered_ops()


def _info(node: Any, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _product_types(compiled: Any) -> dict[str, int]:
    """How many convolutions and products run in each type."""
    kinds: dict[str, int] = {}
    for node in _nodes(compiled):
        if _info(node, "layerType") in ("Convolution", "FullyConnected", "MatMul"):
            kind = _info(node, "runtimePrecision")
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds
