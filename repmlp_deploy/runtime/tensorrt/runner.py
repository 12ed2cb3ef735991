"""TensorRT and TensorRT-RTX engines: one engine, a bounded pool of workers, any number of threads.

Needs the flavour's package and one of the device memory back ends; neither torch nor onnx.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.errors import InputError
from repmlp_deploy.runtime.runner import EngineSettings, RunnerOptions
from repmlp_deploy.runtime.tensorrt.device_arrays import as_device_array
from repmlp_deploy.runtime.tensorrt.device_memory import DeviceMemory, open_memory
from repmlp_deploy.runtime.tensorrt.engine import (
    FLAVOURS,
    EngineRecord,
    LoadedEngine,
    Tensor,
    check_engine,
    import_flavour,
    load_engine,
)
from repmlp_deploy.runtime.tensorrt.runtime_cache import RuntimeCache
from repmlp_deploy.runtime.tensorrt.worker import Contexts, Input, Worker, batch_buckets

__all__ = ["TensorRTRunner", "open_rtx_runner", "open_trt_runner"]


class TensorRTRunner:
    """The bundle's engine on an NVIDIA GPU.

    Args:
        bundle: on disk.
        options: `engine` says how it is run; `cache` is the folder of TensorRT-RTX's runtime cache, by default the one
            that the bundle lies in; `threads` has no meaning here.
        artifact_format: `trt` or `trt-rtx`.

    Raises:
        BundleError: the file or the manifest is not what was certified, or the engine is of another release.
        InputError: the options name another device than CUDA's.
        MissingDependency: the flavour's package, or the back end's, is not installed.
        MissingDevice: there is no driver, or the engine is for other GPUs.
        DeviceError: the GPU has no room for a worker.
    """

    device = "cuda"

    def __init__(
        self,
        bundle: Bundle,
        options: RunnerOptions,
        *,
        artifact_format: str,
    ) -> None:
        settings = options.engine
        self.format = artifact_format
        _check_options(artifact_format, options, settings)
        record = EngineRecord.of(bundle, artifact_format)
        trt = import_flavour(artifact_format)
        self._memory = open_memory(settings.memory, settings.device)
        check_engine(
            record,
            bundle.manifest,
            artifact_format=artifact_format,
            version=trt.__version__,
            capability=self._memory.capability,
        )
        plan = bundle.read(bundle.artifact(artifact_format))
        with self._memory.active():
            self._loaded: LoadedEngine | None = load_engine(trt, plan, record, bundle.manifest)
            self._jit = _Jit(self._loaded, settings, _cache_file(bundle, options, record, self._memory.capability))
        buckets = self._buckets(bundle, settings)
        contexts = Contexts(self._loaded, self._jit.config, buckets)
        self._pool = _Pool(contexts, self._memory, settings.workers)
        self.details: dict[str, Any] = {
            "runtime": f"{trt.__name__} {trt.__version__}",
            "memory": self._memory.name,
            "compute_capability": self._memory.capability,
            "workers": settings.workers,
            "cuda_graphs": self._describe_graphs(settings, buckets),
            **self._jit.details(),
        }

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch: (N, C, H, W) float32 -> (N, …) float32, the first output."""
        output: NDArray[np.float32] = self.run_all(batch)[0]
        return output

    def run_all(self, *inputs: Any) -> list[NDArray[Any]]:
        """Run every input and return every output, both in the manifest's order.

        Args:
            inputs: NumPy arrays, or arrays on the device that have `__cuda_array_interface__`; those are read where
                they lie, or copied on the device where their address is not a multiple of 256.

        Returns:
            Arrays the caller owns.

        Raises:
            InputError: a shape or type is not the network's, or the batch is outside the engine's profiles.
            DeviceError: the GPU failed.
        """
        loaded = self._loaded
        if loaded is None:
            raise InputError("the runner was closed")
        if len(inputs) != len(loaded.inputs):
            raise InputError(f"{len(inputs)} inputs are given; the engine has {len(loaded.inputs)}")
        arrays = [_as_input(tensor, value) for tensor, value in zip(loaded.inputs, inputs, strict=True)]
        batch = _common_batch(loaded, arrays)
        with self._pool.worker() as worker:
            outputs = worker.run(arrays, batch)
            if worker.refusal is not None:
                self.details["cuda_graphs"] = f"off: {worker.refusal}"
        if self._jit.save_first():
            self.details.update(self._jit.details())
        return outputs

    def close(self) -> None:
        """Wait for what runs, keep the runtime cache, and give everything back."""
        if self._loaded is None:
            return
        self._pool.close()
        with self._memory.active():
            self._jit.close()
            # the engine goes with its last reference
            self._loaded = None
            self._pool.forget()

    def _buckets(self, bundle: Bundle, settings: EngineSettings) -> frozenset[int]:
        """Return the batch sizes that workers capture graphs for."""
        assert self._loaded is not None  # noqa: S101 - it was loaded above
        if not settings.cuda_graphs or self._jit.config is not None or not self._memory.captures:
            return frozenset()
        best = [shapes[1][0] for profile in self._loaded.record.profiles for shapes in profile.values()]
        return batch_buckets(bundle.manifest.batch.min, bundle.manifest.batch.max, best)

    def _describe_graphs(self, settings: EngineSettings, buckets: frozenset[int]) -> str:
        if not settings.cuda_graphs:
            return "off"
        if self._jit.config is not None:
            return "captured by TensorRT-RTX"
        if not buckets:
            return f"off: {self._memory.name} captures none"
        return f"captured at batch {', '.join(map(str, sorted(buckets)))}"


def open_trt_runner(bundle: Bundle, options: RunnerOptions) -> TensorRTRunner:
    """Open the runner of a bundle's TensorRT engine."""
    return TensorRTRunner(bundle, options, artifact_format="trt")


def open_rtx_runner(bundle: Bundle, options: RunnerOptions) -> TensorRTRunner:
    """Open the runner of a bundle's TensorRT-RTX engine."""
    return TensorRTRunner(bundle, options, artifact_format="trt-rtx")


class _Pool:
    """At most so many workers, made when they are first needed, each in one thread's hands at a time."""

    def __init__(self, contexts: Contexts, memory: DeviceMemory, limit: int) -> None:
        self._contexts: Contexts | None = contexts
        self._memory = memory
        self._limit = limit
        self._idle: list[Worker] = []
        self._busy = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Lend a worker to this thread alone. One that fails is closed for good and replaced."""
        worker = self._take()
        try:
            yield worker
        except BaseException:
            # the first failure is what counts; the device may not let go of what the worker held
            with suppress(Exception):
                worker.close()
            self._give_back(None)
            raise
        self._give_back(worker)

    def close(self) -> None:
        """Let nobody in, wait until all workers are idle, and close them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._busy == 0)
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def forget(self) -> None:
        """Drop the engine."""
        self._contexts = None

    def _take(self) -> Worker:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._idle or self._busy < self._limit)
            if self._closed or self._contexts is None:
                raise InputError("the runner was closed")
            self._busy += 1
            if self._idle:
                return self._idle.pop()
            contexts = self._contexts
        try:
            return Worker(contexts, self._memory)
        except BaseException:
            self._give_back(None)
            raise

    def _give_back(self, worker: Worker | None) -> None:
        with self._changed:
            self._busy -= 1
            if worker is not None:
                self._idle.append(worker)
            self._changed.notify_all()


class _Jit:
    """What TensorRT-RTX compiles where the engine runs: its runtime configuration and the cache of its kernels.

    TensorRT compiles nothing there; for its engines there is no configuration and no cache.
    """

    def __init__(self, loaded: LoadedEngine, settings: EngineSettings, file: Path) -> None:
        self.config: Any = None
        self._cache: Any = None
        self._file = RuntimeCache(file)
        self._saved = threading.Event()
        if not FLAVOURS[loaded.record.flavour].compiles:
            return
        config = loaded.engine.create_runtime_config()
        strategies = loaded.trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if settings.cuda_graphs else strategies.DISABLED
        self._cache = config.create_runtime_cache()
        content = self._file.read()
        if content is not None and not self._cache.deserialize(content):
            self._file.refused()
        config.set_runtime_cache(self._cache)
        self.config = config

    def details(self) -> dict[str, str]:
        """Describe what happened to the cache."""
        return {} if self.config is None else {"runtime_cache": f"{self._file.path}: {self._file.note}"}

    def save_first(self) -> bool:
        """Keep what the first inference compiled, for a service may never be closed; whether this call did."""
        if self._saved.is_set():
            return False
        self._saved.set()
        self._save()
        return True

    def close(self) -> None:
        """Keep what was compiled, and drop configuration and cache."""
        self._save()
        self.config = self._cache = None

    def _save(self) -> None:
        cache = self._cache
        if cache is not None:
            self._file.write(bytes(cache.serialize()))


def _cache_file(bundle: Bundle, options: RunnerOptions, record: EngineRecord, capability: str) -> Path:
    """Return the runtime cache of one engine, release and kind of GPU: in the options' folder, or beside the bundle."""
    name = f"{bundle.manifest.name}-{record.flavour}-{record.version}-sm{capability.replace('.', '')}.cache"
    engine = bundle.artifact(record.flavour).sha256[:12]
    if options.cache is not None or bundle.folder is None:
        return (options.cache or Path()) / f"{engine}-{name}"
    folder = bundle.folder.resolve()
    return folder.parent / f".{folder.name}.{engine}-{name}"


def _check_options(artifact_format: str, options: RunnerOptions, settings: EngineSettings) -> None:
    if options.device not in (None, "cuda"):
        raise InputError(f"device is {options.device!r}; {artifact_format} engines run on cuda")
    if settings.workers < 1:
        raise InputError(f"workers is {settings.workers}; it must be at least 1")


def _as_input(tensor: Tensor, value: Any) -> Input:
    """Return an input as a worker takes it, its type and shape checked.

    Raises:
        InputError: it is no array, or not of the engine's type or shape.
    """
    array = value if isinstance(value, np.ndarray) else as_device_array(value)
    if array is None:
        raise InputError(
            f"{tensor.name} is {type(value).__name__}; expected a NumPy array or one with __cuda_array_interface__"
        )
    if array.dtype != tensor.dtype:
        raise InputError(f"{tensor.name} is {array.dtype}; the engine takes {tensor.dtype}")
    if len(array.shape) != len(tensor.shape) or array.shape[1:] != tensor.shape[1:]:
        takes = ", ".join(map(str, tensor.shape[1:]))
        raise InputError(f"{tensor.name} is {array.shape}; the engine takes (N, {takes})")
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array


def _common_batch(loaded: LoadedEngine, arrays: list[Input]) -> int:
    """Return the batch size of all inputs; a profile must serve it.

    Raises:
        InputError: it differs between inputs, or no profile serves it.
    """
    sizes = {array.shape[0] for array in arrays}
    if len(sizes) != 1:
        raise InputError(f"the inputs have batches {', '.join(map(str, sorted(sizes)))}; they must be of one size")
    batch = sizes.pop()
    if loaded.find_profile(batch) is None:
        served = ", ".join(f"{lo} to {hi}" for lo, hi in loaded.batches())
        raise InputError(f"batch is {batch}; the engine serves {served}")
    return int(batch)
