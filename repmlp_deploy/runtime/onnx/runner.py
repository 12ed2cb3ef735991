"""ONNX Runtime: one session, safe to share between threads."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.errors import BundleError, DeviceError, InputError, MissingDependency, MissingDevice
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.cache import Cache, cache_key, describe_processor
from repmlp_deploy.runtime.cpus import thread_limit, usable_cpus
from repmlp_deploy.runtime.onnx.providers import COMPILING, PROVIDERS, open_provider_session
from repmlp_deploy.runtime.onnx.weights import split_weights
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.slices import Streams

try:
    import onnxruntime as ort
except ImportError:
    raise MissingDependency("onnxruntime", "cpu") from None

__all__ = ["OnnxRunner", "open_cached", "open_session", "session_settings"]

_COPY = (1, 32)  # up to this release, a session was seen to copy the weights that it is given; see the tests
_kept: WeakKeyDictionary[ort.InferenceSession, object] = WeakKeyDictionary()
"""The weights that a session may read as long as it lives."""


def open_session(model: bytes | memoryview, options: RunnerOptions) -> tuple[ort.InferenceSession, str]:
    """Open a session on a serialized model; return it and the device it really runs on.

    If you name a device, the session runs on it or this raises: ONNX Runtime itself falls back and only logs it.

    Raises:
        InputError: there is no such device name.
        MissingDependency: the device's plugin is not installed.
        MissingDevice: the device is not there.
        BundleError: ONNX Runtime refuses the model.
    """
    return _start(model, session_settings(options), options)


def open_cached(
    read: Callable[[], bytes | memoryview], options: RunnerOptions, cache: Cache, digest: str
) -> tuple[ort.InferenceSession, str, str]:
    """Open a session as `open_session` does; also return where its optimised graph came from.

    Args:
        read: gives the serialized model; not called where the cache has it optimised.
        options: device and threads.
        cache: where optimised graphs are kept.
        digest: the model's SHA-256.
    """
    settings = session_settings(options)
    runtime = ("onnxruntime", ort.__version__, "precise")  # before the precision mode, graphs had other kernels
    key = cache_key(*runtime, digest, _providers(options.device)[1], describe_processor())
    stored = cache.load(key)
    if stored is not None:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return *_start(stored, settings, options), "from the cache"
        except BundleError:  # whole, and yet not what this version reads: made again below
            settings = session_settings(options)
    with tempfile.TemporaryDirectory(prefix="repmlp-optimised-") as folder:
        path = Path(folder, "model.onnx")
        settings.optimized_model_filepath = str(path)
        started = _start(read(), settings, options)
        cache.store(key, path.read_bytes())
    return *started, "here, and cached"


def session_settings(options: RunnerOptions) -> ort.SessionOptions:
    """Return the settings of every session that runs an artifact on a CPU.

    Raises:
        InputError: there are no threads.
    """
    if options.threads is not None and options.threads < 1:
        raise InputError(f"threads is {options.threads}; it must be at least 1")
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # errors are raised too; what matters of the rest is checked below
    # Threads wait for the next node spinning, and between calls not at all: an idle service then costs no processor.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    # A graph may name files for its weights, by default in the working folder: no digest covers them, so none is found.
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    # CPUs without VNNI add pairs of int8 products in 16 bits, where sums are cut off: int8 weights become uint8 there,
    # which other kernels compute right, a third slower. On other CPUs this changes nothing.
    settings.add_session_config_entry("session.x64quantprecision", "1")
    threads = _threads(options)
    if threads is not None:
        settings.intra_op_num_threads = threads
    return settings


def _threads(options: RunnerOptions) -> int | None:
    """Return the threads of the session; None for ONNX Runtime's choice.

    Inferences that run at a time share the session's threads, and every caller's own thread works, too.
    """
    if options.threads is not None:
        return options.threads
    return thread_limit() if options.streams == 1 else max(1, usable_cpus() - options.streams + 1)


def _providers(device: str | None) -> tuple[str, list[str]]:
    """Return the device that is asked for, and the providers to request."""
    if device is not None and device not in PROVIDERS:
        raise InputError(f"device is {device!r}; expected one of {', '.join(PROVIDERS)}")
    available = ort.get_available_providers()
    wanted = device or ("cuda" if PROVIDERS["cuda"].name in available else "cpu")
    return wanted, [PROVIDERS[wanted].name, *PROVIDERS[wanted].behind]


def _start(
    model: bytes | memoryview, settings: ort.SessionOptions, options: RunnerOptions
) -> tuple[ort.InferenceSession, str]:
    wanted, (name, *_) = _providers(options.device)
    whole = wanted != "cpu" or settings.optimized_model_filepath  # a graph that is written needs its weights
    split = None if whole else split_weights(model)
    if split is not None:
        values = [ort.OrtValue.ortvalue_from_numpy(weight) for weight in split.weights.values()]
        settings.add_external_initializers(list(split.weights), values)
    try:
        session = open_provider_session(bytes(model) if split is None else split.graph, settings, wanted, options.cache)
    except (MissingDevice, MissingDependency):
        raise
    except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base
        if "NOT_IMPLEMENTED" in str(error):  # bf16 on the CPU
            raise MissingDevice(
                f"ONNX Runtime's {name} cannot compute this graph ({str(error).rpartition(' : ')[2]}): "
                "run it on a GPU, or export --format openvino or another --precision"
            ) from None
        raise BundleError(f"ONNX Runtime refuses the model: {str(error).splitlines()[0]}") from None
    if split is not None and _release(ort.__version__) > _COPY:
        _kept[session] = split.weights
    device = wanted if session.get_providers()[0] == name else "cpu"
    if options.device is not None and device != options.device:
        raise MissingDevice(
            f"ONNX Runtime could not start {name}, only {', '.join(session.get_providers())}: "
            "the driver, CUDA or cuDNN it needs is missing or of another version"
        )
    session.disable_fallback()  # or a failure on the device would end on the CPU, unseen
    return session, device


def _release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version; a later one than any, where it has none."""
    words = version.split(".")[:2]
    return tuple(int(word) for word in words) if all(word.isdecimal() for word in words) else (sys.maxsize,)


def _require_edges(session: ort.InferenceSession, bundle: Bundle) -> None:
    """Raise BundleError unless the graph has as many inputs and outputs as the manifest says."""
    has = len(session.get_inputs()), len(session.get_outputs())
    said = len(bundle.manifest.inputs), len(bundle.manifest.outputs)
    if has != said:
        raise BundleError(
            f"the graph of {bundle.manifest.name} has {has[0]} inputs and {has[1]} outputs; "
            f"the manifest says {said[0]} and {said[1]}: export the checkpoint again"
        )


class OnnxRunner:
    """The bundle's ONNX artifact in ONNX Runtime."""

    format = "onnx"

    def __init__(self, bundle: Bundle, options: RunnerOptions) -> None:
        entry = bundle.artifact(self.format)
        # other precisions start no faster from a cache: checking it takes as long as optimizing the graph again
        keeps = entry.precision in PRECISIONS and PRECISIONS[entry.precision].keeps_graph
        if options.cache is not None and keeps and options.device not in COMPILING:
            cache = Cache(options.cache)
            self._session, self.device, came = open_cached(lambda: bundle.view(entry), options, cache, entry.sha256)
        else:
            self._session, self.device = open_session(bundle.view(entry), options)
            came = "here"
        self._inputs = [value.name for value in self._session.get_inputs()]
        _require_edges(self._session, bundle)
        self.details: dict[str, Any] = {
            "runtime": f"onnxruntime {ort.__version__}",
            "providers": self._session.get_providers(),
            "threads": _threads(options),
            "optimised": came,
        }
        self._streams = Streams(bundle.manifest.batch, options.streams) if self.device == "cpu" else None
        if self._streams is not None:
            self.details |= {"images_at_once": bundle.manifest.batch.opt, "streams": options.streams}

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch: (N, C, H, W) float32 -> (N, …) float32; see `slices` for large N on a CPU."""
        output: NDArray[np.float32] = self.run_all(batch)[0]
        return output

    def run_all(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Run every input and return every output, both in the graph's order.

        Raises:
            DeviceError: ONNX Runtime fails, as where the memory does not suffice.
        """
        return self._at_once(*inputs) if self._streams is None else self._streams.run(self._at_once, inputs)

    def _at_once(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        feeds = dict(zip(self._inputs, inputs, strict=True))
        try:
            outputs: list[NDArray[Any]] = self._session.run(None, feeds)
        except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base
            raise DeviceError(
                f"ONNX Runtime cannot run the model on {self.device}: {str(error).splitlines()[0]}"
            ) from None
        return outputs

    def close(self) -> None:
        """Give back the session's memory."""
        if self._streams is not None:
            self._streams.close()
        del self._session, self._streams
