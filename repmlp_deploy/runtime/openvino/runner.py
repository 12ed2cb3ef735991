"""OpenVINO: a model compiled for the CPU in the precision its artifact records, with a pool of infer requests.

OpenVINO takes bfloat16 by itself wherever the CPU has it, and emulates it slowly on AVX-512 without it. So the
precision is always named, and the plugin's reply is compared with the request.
"""

from __future__ import annotations

import io
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import Bundle
from repmlp_deploy.errors import BundleError, DeviceError, InputError, MissingDependency, MissingDevice
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.cache import Cache, cache_key
from repmlp_deploy.runtime.cpus import thread_limit
from repmlp_deploy.runtime.openvino.int8 import fit_weights, int8_kernels
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.slices import Streams

try:
    import openvino as ov
except ImportError:
    raise MissingDependency("openvino", "openvino") from None

__all__ = ["COMPUTES_IN", "CompiledIR", "OpenVinoRunner", "layer_info"]

_NAMES = {name: entry.openvino for name, entry in PRECISIONS.items() if entry.openvino}
COMPUTES_IN = MappingProxyType({name: names.computes for name, names in _NAMES.items()})
"""An artifact's precision to the inference precision that the runner requests."""

Constants = bytes | memoryview

_PRODUCTS = ("Convolution", "FullyConnected", "FullyConnectedQuantizedLegacy", "MatMul")
_REQUESTS = 8  # per stream; more callers wait: a stream runs one inference at a time, the others only hold memory


class OpenVinoRunner:
    """The bundle's OpenVINO artifact."""

    format = "openvino"

    def __init__(self, bundle: Bundle, options: RunnerOptions) -> None:
        entry = bundle.artifact(self.format)
        if len(entry.companions) != 1:
            raise BundleError(f"{entry.path} comes with {len(entry.companions)} files; expected one, of weights")
        files = (entry, entry.companions[0])
        self._model = CompiledIR(
            lambda: (bytes(bundle.view(files[0])), bundle.view(files[1])),
            entry.precision,
            options,
            key=" ".join(file.sha256 for file in files),
        )
        self.device = self._model.device
        batch = bundle.manifest.batch
        self._streams = Streams(batch, int(self._model.details["streams"]))
        self.details: dict[str, Any] = {**self._model.details, "images_at_once": batch.opt}

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run a batch: (N, C, H, W) float32 -> (N, …) float32; see `slices` for large N."""
        output: NDArray[np.float32] = self.run_all(batch)[0]
        return output

    def run_all(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Run every input and return every output, both in the model's order."""
        return self._streams.run(self._model.run_all, inputs)

    def products(self) -> dict[str, int]:
        """Return how many convolutions and products run in each type."""
        return self._model.products()

    def close(self) -> None:
        """Give back the model's memory."""
        self._streams.close()
        del self._model, self._streams


class CompiledIR:
    """A model compiled from memory; `run_all` may be called from any number of threads.

    Args:
        read: gives the IR's topology and its constants; not called where the cache has the compiled model. Constants in
            memory that can be written to are shared with OpenVINO, and then belong to the model.
        precision: a key of `COMPUTES_IN`.
        options: device, threads and cache.
        key: what tells this model from others in the cache; without one nothing is cached, nor in other precisions than
            int8.
        more: further properties of the plugin.
        further: friendly names of nodes whose values are outputs too, after the model's own; none of them already is.

    Raises:
        InputError: a device other than the CPU, or no threads.
        MissingDevice: the CPU does not compute in the precision.
        BundleError: OpenVINO refuses the model.
    """

    device = "cpu"

    def __init__(  # noqa: PLR0913 - the model, and all that decides how it is compiled
        self,
        read: Callable[[], tuple[bytes, Constants]],
        precision: str,
        options: RunnerOptions,
        *,
        key: str = "",
        more: Mapping[str, Any] = MappingProxyType({}),
        further: Sequence[str] = (),
    ) -> None:
        core = ov.Core()
        _check(core, precision, options)
        settings = {**_settings(precision, options), **more}
        # in other precisions a model is compiled as quickly as it would be read and checked
        keeps = bool(key) and PRECISIONS[precision].keeps_graph
        cache = Cache(options.cache) if options.cache is not None and keeps else None
        is_int8 = PRECISIONS[precision].lowering == "quantize"
        self._shared: Constants | None = None  # what the compiled model reads as long as it lives

        def model() -> Any:
            topology, self._shared = read()
            asked = _read_model(core, topology, self._shared, further)
            if is_int8:
                fit_weights(asked, int8_kernels())
            return asked

        # what the kernels get right may change what is compiled
        key = f"{key} {int8_kernels()}" if key and is_int8 else key
        self.compiled, came = _compile(core, model, settings, cache, key)
        hint = self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if hint != settings["INFERENCE_PRECISION_HINT"]:
            raise MissingDevice(f"OpenVINO was asked for {settings['INFERENCE_PRECISION_HINT']} and answers {hint}")
        self._inputs = [_edges(port) for port in self.compiled.inputs]
        self._requests: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(_REQUESTS * options.streams):
            self._requests.put(None)  # made when first needed
        self.details: dict[str, Any] = {
            "runtime": f"openvino {ov.__version__}",
            "processor": core.get_property("CPU", "FULL_DEVICE_NAME"),
            "inference_precision": hint,
            "threads": self.compiled.get_property("INFERENCE_NUM_THREADS"),
            "streams": self.compiled.get_property("NUM_STREAMS"),
            "compiled": came,
        }
        if is_int8 and (said := int8_kernels().describe()):
            self.details["int8"] = said

    def run_all(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """Run every input and return every output, both in the model's order.

        Raises:
            InputError: an input has another shape than the model's; OpenVINO itself runs some of them all the same.
            DeviceError: OpenVINO fails, as where the memory does not suffice.
        """
        for value, (edges, dtype) in zip(inputs, self._inputs, strict=True):
            fits = len(value.shape) == len(edges) and all(
                b in (None, a) for a, b in zip(value.shape, edges, strict=True)
            )
            if not fits or value.dtype != dtype:
                takes = ", ".join("N" if edge is None else str(edge) for edge in edges)
                raise InputError(f"input is {value.dtype} {value.shape}; the model takes {dtype} ({takes})")
        with self._request() as request:
            try:
                # In a thread of OpenVINO's: `infer` runs in the caller's, and keeps something of the model there. If
                # that thread ends while the model is given back, both free the same memory (seen in 2026.4).
                request.start_async(list(inputs), share_inputs=False)
                request.wait()
            except RuntimeError as error:
                raise DeviceError(f"OpenVINO cannot run the model: {' '.join(str(error).split())}") from None
            return [np.array(tensor.data) for tensor in request.output_tensors]

    def products(self) -> dict[str, int]:
        """Return how many convolutions and products run in each type, as the plugin says of the compiled model."""
        kinds: dict[str, int] = {}
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            if layer_info(node, "layerType") in _PRODUCTS:
                kind = layer_info(node, "runtimePrecision")
                kinds[kind] = kinds.get(kind, 0) + 1
        return dict(sorted(kinds.items()))

    @contextmanager
    def _request(self) -> Iterator[Any]:
        """Lend an infer request to this caller alone."""
        lent, given_back = self._requests.get(), None
        try:
            request = self.compiled.create_infer_request() if lent is None else lent
            yield request
            given_back = request
        finally:
            # what an interrupted call leaves may still run: the next caller gets another
            self._requests.put(given_back)


def layer_info(node: Any, key: str) -> str:
    """Return what a node of a compiled model records under `key`; empty if nothing."""
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _edges(port: Any) -> tuple[list[int | None], Any]:
    """Return the shape and type of an input; None for a symbolic size."""
    edges = [edge.get_length() if edge.is_static else None for edge in port.get_partial_shape()]
    return edges, np.dtype(port.get_element_type().to_dtype())


def _check(core: Any, precision: str, options: RunnerOptions) -> None:
    """Raise unless this machine can run the precision as asked for."""
    if options.device not in (None, "cpu"):
        raise InputError(f"device is {options.device!r}; the openvino artifact runs on cpu")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"threads is {options.threads}; it must be at least 1")
    if precision not in COMPUTES_IN:
        raise BundleError(f"the openvino artifact is {precision}; this version runs {', '.join(COMPUTES_IN)}")
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if _NAMES[precision].capability not in able:
        raise MissingDevice(
            f"this CPU has no {precision} instructions (OpenVINO names {', '.join(able)}): export fp32 or int8 for it"
        )


def _settings(precision: str, options: RunnerOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": COMPUTES_IN[precision],
        "PERFORMANCE_HINT": "LATENCY" if options.streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": options.streams,
        "ENABLE_CPU_PINNING": False,  # by default every process with one thread pins it to the same core
    }
    threads = options.threads * options.streams if options.threads is not None else thread_limit()
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads  # of all streams together
    return settings


def _read_model(core: Any, topology: bytes, constants: Constants, further: Sequence[str]) -> Any:
    """Read the model; make the values of nodes of the names `further` its outputs too."""
    if isinstance(constants, memoryview) and not constants.readonly and len(constants):
        model = core.read_model(topology, ov.Tensor(np.frombuffer(constants, np.uint8), shared_memory=True))
    else:
        model = core.read_model(topology, bytes(constants))
    if further:
        nodes = {node.get_friendly_name(): node for node in model.get_ops()}
        model.add_outputs([nodes[name].output(0) for name in further])
    return model


def _compile(
    core: Any, read: Callable[[], Any], settings: dict[str, Any], cache: Cache | None, key: str
) -> tuple[Any, str]:
    """Compile the model; return it and where it came from."""
    if cache is not None:
        machine = (core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"))
        key = cache_key("openvino", ov.get_version(), key, sorted(settings.items()), *machine)
        blob = cache.load(key)
        if blob is not None:
            try:
                return core.import_model(blob, "CPU", settings), "from the cache"
            except RuntimeError:  # whole, and yet not what this version reads: made again below
                pass
    try:
        compiled = core.compile_model(read(), "CPU", settings)
    except RuntimeError as error:
        raise BundleError(f"OpenVINO refuses the model: {_last_line(error)}") from None
    if cache is None:
        return compiled, "here"
    exported = compiled.export_model()
    cache.store(key, exported.getvalue() if isinstance(exported, io.BytesIO) else bytes(exported))
    return compiled, "here, and cached"


def _last_line(error: Exception) -> str:
    """Return OpenVINO's message without the source lines before it."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
