"""What every runtime offers, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.errors import InputError, MissingDependency

__all__ = ["RUNNERS", "THROUGHPUT", "EngineSettings", "Runner", "RunnerOptions", "open_named", "stream_count"]

THROUGHPUT = 0
"""As `streams`: as many as a measurement finds best."""

_MOST_STREAMS = 256


@dataclass(frozen=True)
class EngineSettings:
    """How a TensorRT engine is run.

    Attributes:
        memory: the device memory back end, `cuda-python` or `pycuda`, an entry of `device_memory.DEVICE_MEMORY`.
        device: index of the GPU; None for the first, or the one whose context the back end joins.
        workers: at most so many inferences at a time; each holds buffers and scratch memory for the largest batch.
        cuda_graphs: whether to use CUDA graphs where the back end and the engine allow it.
    """

    memory: str = "cuda-python"
    device: int | None = None
    workers: int = 2
    cuda_graphs: bool = True


@dataclass(frozen=True)
class RunnerOptions:
    """How an artifact is to be run.

    Attributes:
        device: an entry of `DEVICES`, or None for the best that is there.
        threads: of one inference; None leaves the choice to the runtime, or to what the process is allowed.
        cache: folder for what a runtime compiles or optimises, so that the next start is quick. None keeps nothing, but
            for TensorRT-RTX's own cache, without which every start compiles for seconds: it lies beside the bundle.
        engine: for TensorRT engines.
        streams: inferences that run at a time on a CPU, or `THROUGHPUT`.
    """

    device: str | None = None
    threads: int | None = None
    cache: Path | None = None
    engine: EngineSettings = EngineSettings()
    streams: int = 1


class Runner(Protocol):
    """One loaded artifact; `run` may be called from any number of threads."""

    format: str
    device: str
    details: dict[str, Any]

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch within the artifact's range: (N, C, H, W) float32 -> (N, …) float32, owned by the caller."""
        ...

    def run_all(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Run every input, in its order, and return every output, in the manifest's order."""
        ...

    def close(self) -> None:
        """Give back memory and devices."""
        ...


@dataclass(frozen=True)
class Entry:
    """A runtime.

    Attributes:
        opens: `module:function` from (bundle, options) to a `Runner`; the module is imported when it is needed.
        devices: names of the devices it knows.
        packages: that bring it, as they are installed; any one of them.
    """

    opens: str
    devices: tuple[str, ...]
    packages: tuple[str, ...] = ()

    def open(self, bundle: Bundle, options: RunnerOptions) -> Runner:
        """Return the runner of a bundle's artifact.

        Raises:
            KeyboardInterrupt: it came while the runtime was imported, which made a failed import of it.
        """
        module, _, name = self.opens.partition(":")
        try:
            make: Callable[[Bundle, RunnerOptions], Runner] = getattr(import_module(module), name)
        except MissingDependency as error:
            if _is_interruption(error):  # else another artifact would run instead
                raise KeyboardInterrupt from error
            raise
        return make(bundle, options)

    def versions(self) -> str:
        """Return the packages that bring it here, with their versions, without importing them; empty if none does."""
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - 30 ms that only a cache needs

        found = []
        for package in self.packages:
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                continue
        return ", ".join(found)


def _is_interruption(error: BaseException | None) -> bool:
    """Return whether an error came of an interrupt, which a library's import turned into something else."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


RUNNERS = {
    "openvino": Entry("repmlp_deploy.runtime.openvino.runner:OpenVinoRunner", ("cpu",), ("openvino",)),
    "onnx": Entry(
        "repmlp_deploy.runtime.onnx.runner:OnnxRunner",
        ("cpu", "cuda", "tensorrt", "rtx"),
        ("onnxruntime", "onnxruntime-gpu"),
    ),
    # last: an engine has not run where it was built, so it is used only if it is named or nothing else runs
    "trt": Entry("repmlp_deploy.runtime.tensorrt.runner:open_trt_runner", ("cuda",)),
    "trt-rtx": Entry("repmlp_deploy.runtime.tensorrt.runner:open_rtx_runner", ("cuda",)),
}
"""Artifact format to what runs it, the preferred one first. Adding a runtime costs a module and an entry."""


def open_named(bundle: Bundle, artifact_format: str, options: RunnerOptions) -> Runner:
    """Open the artifact of one format.

    Raises:
        BundleError: the bundle has no such artifact, or it is damaged.
        InputError: nothing runs this format, or not on the device.
        MissingDependency: the runtime is not installed.
        MissingDevice: the device, or what the precision needs of it, is not there.
    """
    bundle.artifact(artifact_format)
    if artifact_format not in RUNNERS:
        raise InputError(f"Predictor cannot run {artifact_format}; it runs {', '.join(RUNNERS)}")
    runs_on_cpu = "cpu" in RUNNERS[artifact_format].devices and options.device in (None, "cpu")
    if options.streams > 1 and not runs_on_cpu:
        raise InputError(
            f"streams are for CPUs; how many inferences run at a time on {options.device or artifact_format}"
            " is EngineSettings(workers=…)"
        )
    if not runs_on_cpu or options.cache is not None:  # an engine's runtime, or a cache, may not need the files
        return RUNNERS[artifact_format].open(bundle, options)
    entry = bundle.artifact(artifact_format)
    with bundle.reading_ahead((entry, *entry.companions)) as ahead:  # while the runtime is imported
        return RUNNERS[artifact_format].open(ahead, options)


def stream_count(given: object) -> int:
    """Return `streams` of `RunnerOptions` for what a user says: a number, its digits, `latency` or `throughput`.

    Raises:
        InputError: it is something else.
    """
    names = {"latency": 1, "throughput": THROUGHPUT}
    if isinstance(given, str) and given in names:
        return names[given]
    word = given if isinstance(given, str) else str(given) if type(given) is int else ""
    if word.isascii() and word.isdecimal() and 0 < int(word[:9]) <= _MOST_STREAMS:
        return int(word)
    raise InputError(f"streams is {given!r}; expected latency, throughput or a number from 1 to {_MOST_STREAMS}")
