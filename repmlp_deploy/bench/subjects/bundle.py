"""Bundles: an artifact run by the runtime's own runner, exactly as `Predictor` runs it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bench.measure.results import ProfileLine
from repmlp_deploy.bench.subjects.table import SUBJECTS, Job
from repmlp_deploy.bundle import Bundle
from repmlp_deploy.errors import InputError, installation_of
from repmlp_deploy.runtime.choice import open_runner
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.slices import slices_of

__all__ = ["BundleSubject", "open_bundle"]

_ON_DEVICE = ("onnx",)  # the device of the others is the artifact's


def open_bundle(job: Job) -> BundleSubject:
    """Open the job's artifact in its runner."""
    if job.bundle is None:
        raise InputError(f"{job.format} needs a bundle")
    return BundleSubject(Bundle.load(job.bundle), job)


def why_no_cuda() -> str | None:
    """Return why this ONNX Runtime does not run on a GPU; None if it may."""
    import onnxruntime as ort  # noqa: PLC0415 - engines run without it

    name = "CUDAExecutionProvider"
    if name in ort.get_available_providers():
        return None
    return f"ONNX Runtime here has no {name}: pip uninstall onnxruntime && {installation_of('gpu')}"


class BundleSubject:
    """One artifact of a bundle."""

    def __init__(self, bundle: Bundle, job: Job) -> None:
        artifact = SUBJECTS[job.format].needs
        self._job = job
        self._bundle = bundle
        device = job.device if artifact in _ON_DEVICE else None
        self._runner = open_runner(bundle, artifact, job.runner_options(device))
        self.proof: dict[str, Any] = {
            **self._runner.details,
            "device": self._runner.device,
            "dtype": bundle.artifact(artifact).precision,
            "sha256": bundle.artifact(artifact).sha256,
        }

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch: (N, C, H, W) float32 -> (N, classes) float32."""
        return self._runner.run(batch)

    def device_ms(self, batch: NDArray[np.float32], calls: int) -> None:
        """Return nothing: runners give arrays of the host, and no events of a stream."""
        del batch, calls

    def profile(self, batch: NDArray[np.float32], calls: int) -> list[ProfileLine]:
        """Return milliseconds per call from ONNX Runtime's own profiler, in a session of its own."""
        import onnxruntime as ort  # noqa: PLC0415 - the profiler is not part of the runner

        from repmlp_deploy.bench.measure.profiling import (  # noqa: PLC0415 - onnx is no part of what is measured
            gather_times,
            node_stages,
            profile_lines,
        )
        from repmlp_deploy.runtime.onnx.runner import session_settings  # noqa: PLC0415 - onnxruntime may be missing

        if self._bundle.folder is None or self._runner.format != "onnx" or self._job.device != "cpu":
            return []
        model = self._bundle.folder / self._bundle.artifact("onnx").path
        settings = session_settings(RunnerOptions(threads=self._job.threads))
        settings.enable_profiling = True
        with tempfile.TemporaryDirectory(prefix="repmlp-profile-") as folder:
            settings.profile_file_prefix = str(Path(folder, "profile"))
            session = ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name
            parts = list(slices_of([batch], self._bundle.manifest.batch))
            for (part,) in parts * (calls + 1):  # the first call is the warm-up
                session.run(None, {name: part})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
        nodes = nodes[len(nodes) // (calls + 1) :]
        times = [(e["name"].removesuffix("_kernel_time"), e["args"]["op_name"], e["dur"] / 1e3) for e in nodes]
        return profile_lines(gather_times(times, node_stages(model), calls), self._job.format, self._job.precision)
