"""A TensorRT module whose engines are ONNX graphs in ONNX Runtime, on the simulated GPU.

Everything public here exists in NVIDIA's bindings with the same parameters; a test compares the two.
"""

from __future__ import annotations

import enum
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from support.fakes.gpu import Block, Gpu, Operation

ALIGNMENT = 256
SCRATCH_BYTES = 4096

TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT64"])
ExecutionContextAllocationStrategy = enum.Enum(
    "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
)
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)

_TYPES = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int64)": DataType.INT64}
_NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64}

Profile = Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Plan:
    """What stands behind the bytes of an engine file."""

    onnx: bytes
    profiles: tuple[Profile, ...]


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity
    Severity = Severity

    def log(self, severity, msg):
        raise NotImplementedError


class IRuntimeCache:
    """Shapes whose kernels are compiled; `kernels:` and the capability come first, as the vendor's checks would."""

    def __init__(self, gpu: Gpu) -> None:
        self._prefix = b"kernels:%d.%d:" % gpu.capability
        self.shapes: set[bytes] = set()

    def serialize(self):
        return self._prefix + b";".join(sorted(self.shapes))

    def deserialize(self, blob):
        if not blob.startswith(self._prefix):
            return False
        self.shapes = set(blob[len(self._prefix) :].split(b";")) - {b""}
        return True


class IRuntimeConfig:
    def __init__(self, gpu: Gpu) -> None:
        gpu.objects.add(self)
        self._gpu = gpu
        self._cache: IRuntimeCache | None = None
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def create_runtime_cache(self):
        return IRuntimeCache(self._gpu)

    def set_runtime_cache(self, cache=None):
        self._cache = cache
        return True

    def get_runtime_cache(self):
        return self._cache


class ICudaEngine:
    def __init__(self, gpu: Gpu, plan: Plan) -> None:
        gpu.objects.add(self)
        self._gpu = gpu
        self._plan = plan
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(plan.onnx, options, providers=["CPUExecutionProvider"])
        values = {v.name: (TensorIOMode.INPUT, v) for v in self._session.get_inputs()}
        self._values = values | {v.name: (TensorIOMode.OUTPUT, v) for v in self._session.get_outputs()}

    @property
    def num_io_tensors(self):
        return len(self._values)

    @property
    def num_optimization_profiles(self):
        return len(self._plan.profiles)

    @property
    def device_memory_size_v2(self):
        return SCRATCH_BYTES

    def get_tensor_name(self, index):
        return list(self._values)[index]

    def get_tensor_mode(self, name):
        return self._values[name][0]

    def get_tensor_dtype(self, name):
        return _TYPES[self._values[name][1].type]

    def get_tensor_shape(self, name):
        return tuple(n if isinstance(n, int) else -1 for n in self._values[name][1].shape)

    def get_tensor_location(self, name):
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name, profile_index):
        return list(self._plan.profiles[profile_index][name])

    def create_runtime_config(self):
        return IRuntimeConfig(self._gpu)

    def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
        config = strategy if isinstance(strategy, IRuntimeConfig) else None
        managed = strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self._gpu, self, config, scratch_is_users=managed)


class IExecutionContext:
    def __init__(self, gpu: Gpu, engine: ICudaEngine, config: IRuntimeConfig | None, *, scratch_is_users: bool) -> None:
        gpu.objects.add(self)
        self._gpu = gpu
        self._engine = engine
        self._config = config
        self._scratch_is_users = scratch_is_users
        self._scratch: int | None = None
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._inside = threading.Lock()
        self._in_flight: int | None = None

    def set_optimization_profile_async(self, profile_index, stream_handle):
        with self._alone():
            if not 0 <= profile_index < self._engine.num_optimization_profiles:
                raise self._gpu.misuse(f"profile {profile_index} does not exist")
            self._profile = profile_index
            self._shapes.clear()
            return True

    def set_input_shape(self, name, shape):
        with self._alone():
            smallest, _, largest = self._engine.get_tensor_profile_shape(name, self._profile)
            if not all(lo <= n <= hi for lo, n, hi in zip(smallest, shape, largest, strict=True)):
                raise self._gpu.misuse(f"shape {shape} of {name} is outside the profile, {smallest} to {largest}")
            self._shapes[name] = tuple(shape)
            return True

    def set_tensor_address(self, name, memory):
        with self._alone():
            if memory % ALIGNMENT:
                raise self._gpu.misuse(f"address {memory:#x} of {name} is not aligned to {ALIGNMENT} bytes")
            self._addresses[name] = memory
            return True

    def set_device_memory(self, memory, size):
        with self._alone():
            if not self._scratch_is_users or size < SCRATCH_BYTES:
                raise self._gpu.misuse("scratch memory that is too small, or for a context that has its own")
            self._scratch = memory

    def get_tensor_shape(self, name):
        batch = {shape[0] for shape in self._shapes.values()}.pop() if self._shapes else -1
        return self._shapes.get(name) or (batch, *self._engine.get_tensor_shape(name)[1:])

    def execute_async_v3(self, stream_handle):
        with self._alone():
            if self._gpu.refuses_capture and self._gpu.is_capturing(stream_handle):
                return False
            values = self._engine._values
            missing = [n for n in values if n not in self._addresses]
            if missing:
                raise self._gpu.misuse(f"address of {', '.join(missing)} was not set")
            if len(self._shapes) < sum(mode is TensorIOMode.INPUT for mode, _ in values.values()):
                raise self._gpu.misuse("an input shape was not set, or a change of profile forgot it")
            self._gpu.enqueue(stream_handle, self._operation())
            return True

    def _operation(self) -> Operation:
        found = {name: self._memory(name) for name in self._engine._values}
        inputs = [name for name, (mode, _) in self._engine._values.items() if mode is TensorIOMode.INPUT]
        outputs = [name for name in found if name not in inputs]
        shapes, writes = dict(self._shapes), [found[name][0] for name in outputs]
        if self._scratch_is_users:
            if self._scratch is None:
                raise self._gpu.misuse("scratch memory was not set")
            writes.append(self._gpu.find(self._scratch, SCRATCH_BYTES)[0])

        def begin() -> None:
            self._in_flight = threading.get_ident()

        def run() -> None:
            self._gpu.on_execute()
            self._gpu.require_live(*(block for block, _ in found.values()), *writes)
            feeds = {n: found[n][1].view(self._dtype(n)).reshape(shapes[n]) for n in inputs}
            self._compile(shapes)
            results = self._engine._session.run(outputs, {n: value.copy() for n, value in feeds.items()})
            for name, value in zip(outputs, results, strict=True):
                found[name][1][:] = value.reshape(-1).view(np.uint8)
            self._in_flight = None

        return Operation("inference", run, [found[name][0] for name in inputs], writes, begin)

    def _memory(self, name: str) -> tuple[Block, np.ndarray]:
        size = int(np.prod(self.get_tensor_shape(name))) * np.dtype(self._dtype(name)).itemsize
        return self._gpu.find(self._addresses[name], size)

    def _dtype(self, name: str) -> Any:
        return _NUMPY[self._engine.get_tensor_dtype(name)]

    def _compile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if self._config is not None:
            cache = self._config.get_runtime_cache()
            key = repr(sorted(shapes.items())).encode()
            if key not in cache.shapes:
                self._gpu.calls.append("compile")
                cache.shapes.add(key)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._inside.acquire(blocking=False):
            raise self._gpu.misuse("two threads are in one execution context")
        try:
            if self._in_flight not in (None, threading.get_ident()):
                raise self._gpu.misuse("two threads use one execution context: another's inference is not done")
            yield
        finally:
            self._inside.release()


def make_tensorrt(gpu: Gpu, name: str, version: str, plans: Mapping[bytes, Plan]) -> types.ModuleType:
    """The module of one flavour, which deserialises `plans` and nothing else."""

    class Runtime:
        def __init__(self, logger):
            self._logger = logger
            gpu.objects.add(self)

        @property
        def engine_host_code_allowed(self):
            return False

        @engine_host_code_allowed.setter
        def engine_host_code_allowed(self, value):
            raise gpu.misuse("engines were allowed to bring host code")

        def deserialize_cuda_engine(self, serialized_engine):
            gpu.calls.append("deserialize")
            if serialized_engine not in plans:
                self._logger.log(ILogger.ERROR, "Error Code 6: the engine is corrupt")
                return None
            return ICudaEngine(gpu, plans[serialized_engine])

    module = types.ModuleType(name)
    module.__version__ = version
    values = [ILogger, Runtime, ICudaEngine, IExecutionContext]
    values += [TensorIOMode, TensorLocation, DataType, ExecutionContextAllocationStrategy]
    if name == "tensorrt_rtx":
        values += [IRuntimeConfig, IRuntimeCache, CudaGraphStrategy]
    for value in values:
        setattr(module, value.__name__, value)
    return module
