"""An engine from a bundle: refused from the manifest where it does not fit this machine, then deserialised.

Deserialising runs native code on the file's content, and what it says of a misfit is seldom a remedy. So nothing native
sees the file before its SHA-256, its flavour, its version, the GPU it is for and its profiles have been checked.
`engine_host_code_allowed` stays at its default, off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from repmlp_deploy.bundle import Bundle, Manifest, TensorSpec
from repmlp_deploy.errors import BundleError, MissingDependency, MissingDevice
from repmlp_deploy.runtime.tensorrt.flavours import FLAVOURS
from repmlp_deploy.runtime.tensorrt.log import recording, shared_logger

__all__ = [
    "FLAVOURS",
    "EngineRecord",
    "LoadedEngine",
    "Tensor",
    "check_engine",
    "import_flavour",
    "load_engine",
]


_OLDEST_BY_DEFAULT = (8, 0)  # what trt-rtx builds for unless GPUs are named, and hardware-compatible engines run on

_NUMPY = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""TensorRT's name of a type to NumPy's; bfloat16 and the narrower types have none."""

Shape = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]
ShapeRange = tuple[Shape, Shape, Shape]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class EngineSwitches(_Record):
    """The builder's options that decide where an engine runs."""

    version_compatible: bool = False
    hardware_compatible: bool = False


class EngineRecord(_Record):
    """What the manifest says of an engine.

    Attributes:
        flavour: its builder, an entry of `FLAVOURS`.
        version: the builder's.
        compute_capabilities: the GPUs it is for, such as `8.6`; None for the builder's own choice.
        profiles: input to its smallest, best and largest shape, with the batch.
        options: of the build.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[str, ...] | None = None
    profiles: Annotated[tuple[dict[str, ShapeRange], ...], Field(min_length=1)]
    options: EngineSwitches = EngineSwitches()

    @classmethod
    def of(cls, bundle: Bundle, artifact_format: str) -> EngineRecord:
        """Return the record in a bundle's manifest.

        Raises:
            BundleError: there is none, or it is not an engine's.
        """
        return bundle.artifact(artifact_format).record(cls, f"{artifact_format} artifact")


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Attributes:
        name: in the graph.
        dtype: of its elements.
        shape: with -1 for what the profile leaves open.
        is_input: whether it is an input.
        nbytes: its length at the largest batch.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_input: bool
    nbytes: int


@dataclass(frozen=True)
class LoadedEngine:
    """A deserialised engine, shared by all workers.

    Attributes:
        trt: the flavour's module.
        runtime: what deserialised it; it must outlive the engine.
        engine: TensorRT's.
        record: what the manifest says of it.
        inputs: in the manifest's order.
        outputs: in the manifest's order.
    """

    trt: Any
    runtime: Any
    engine: Any
    record: EngineRecord
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def find_profile(self, batch: int) -> int | None:
        """Return the profile that serves a batch size, the tightest of several; None if none does."""
        fitting = [(hi - lo, i) for i, (lo, hi) in enumerate(self.batches()) if lo <= batch <= hi]
        return min(fitting)[1] if fitting else None

    def batches(self) -> list[tuple[int, int]]:
        """Return smallest and largest batch of every profile."""
        return [_batches(profile) for profile in self.record.profiles]

    def last_error(self) -> str:
        """Return TensorRT's last message."""
        message: str = shared_logger(self.trt).last_error
        return message


def import_flavour(artifact_format: str) -> Any:
    """Import the Python module that runs a format.

    Raises:
        MissingDependency: it is not installed.
    """
    flavour = FLAVOURS[artifact_format]
    try:
        return import_module(flavour.module)
    except ImportError:
        raise MissingDependency(flavour.module, flavour.extra) from None


def check_engine(
    record: EngineRecord, manifest: Manifest, *, artifact_format: str, version: str, capability: str
) -> None:
    """Raise unless an engine fits the installed package, the GPU and the bundle.

    Args:
        record: what the manifest says of the engine.
        manifest: what it says of the network.
        artifact_format: an entry of `FLAVOURS`.
        version: of the installed package.
        capability: compute capability of the GPU, such as `8.6`.

    Raises:
        BundleError: it is of another flavour or version, or its profiles are not the bundle's.
        MissingDevice: it is for other GPUs.
    """
    package = FLAVOURS[artifact_format].module
    if record.flavour != artifact_format:
        raise BundleError(
            f"the {artifact_format} artifact is an engine of {record.flavour}; {package} cannot run it: export again"
        )
    if not _fits_version(record, version):
        raise BundleError(
            f"the {artifact_format} engine was built by {package} {record.version}; this machine has {version}: "
            f"install that version, or build the engine again with --format {artifact_format}"
        )
    if not _fits_gpu(record, capability):
        raise MissingDevice(
            f"the {artifact_format} engine is for compute capability {_targets(record)}; this GPU has {capability}: "
            f"{_rebuild(artifact_format, capability)}"
        )
    _check_profiles(record, manifest, artifact_format)


def _fits_version(record: EngineRecord, version: str) -> bool:
    if record.version == version:
        return True
    built, here = _numbers(record.version), _numbers(version)
    return record.options.version_compatible and built[:1] == here[:1] and built <= here


def _fits_gpu(record: EngineRecord, capability: str) -> bool:
    if record.options.hardware_compatible or record.compute_capabilities is None:
        return _numbers(capability) >= _OLDEST_BY_DEFAULT
    return capability in record.compute_capabilities


def _targets(record: EngineRecord) -> str:
    oldest = ".".join(map(str, _OLDEST_BY_DEFAULT))
    if record.options.hardware_compatible or record.compute_capabilities is None:
        return f"{oldest} and later"
    return ", ".join(record.compute_capabilities)


def _rebuild(artifact_format: str, capability: str) -> str:
    if artifact_format == "trt-rtx":
        return f"build it with --compute-capability {capability}"
    return "build it on this machine"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _batches(profile: Mapping[str, ShapeRange]) -> tuple[int, int]:
    """Return the batch sizes that all inputs of a profile serve."""
    return max(lo[0] for lo, _, _ in profile.values()), min(hi[0] for _, _, hi in profile.values())


def _check_profiles(record: EngineRecord, manifest: Manifest, artifact_format: str) -> None:
    """Raise unless every profile has the network's inputs, and together they serve the bundle's batch sizes."""
    expected = {spec.name: spec.shape[1:] for spec in manifest.inputs}
    for profile in record.profiles:
        found = {name: {shape[1:] for shape in shapes} for name, shapes in profile.items()}
        if found != {name: {shape} for name, shape in expected.items()}:
            raise BundleError(
                f"the {artifact_format} engine's profile is for {_describe(profile)}; {manifest.name} takes "
                f"{', '.join(f'{name} (N, {_join(shape)})' for name, shape in expected.items())}: export again"
            )
    served = [_batches(profile) for profile in record.profiles]
    missing = [n for n in range(manifest.batch.min, manifest.batch.max + 1) if not _serves(served, n)]
    if missing:
        raise BundleError(
            f"the {artifact_format} engine's profiles serve batches {', '.join(f'{lo} to {hi}' for lo, hi in served)}; "
            f"the bundle says {manifest.batch.min} to {manifest.batch.max}: export again"
        )


def _serves(served: list[tuple[int, int]], batch: int) -> bool:
    return any(lo <= batch <= hi for lo, hi in served)


def _describe(profile: Mapping[str, ShapeRange]) -> str:
    return ", ".join(f"{name} {tuple(best)}" for name, (_, best, _) in profile.items())


def _join(shape: tuple[int | None, ...]) -> str:
    return ", ".join(map(str, shape))


def load_engine(trt: Any, plan: bytes, record: EngineRecord, manifest: Manifest) -> LoadedEngine:
    """Deserialise the engine in `plan` and compare its inputs and outputs with the manifest.

    Args:
        trt: the flavour's module.
        plan: the raw engine, checked.
        record: what the manifest says of it.
        manifest: what it says of the network.

    Raises:
        BundleError: TensorRT refuses it, or it has other inputs, outputs or profiles than the manifest.
    """
    with recording(trt) as said:
        runtime = trt.Runtime(shared_logger(trt))
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        message = said.errors[-1].splitlines()[0] if said.errors else "no message"
        raise BundleError(f"{trt.__name__} {trt.__version__} refuses the engine: {message}")
    found = {name: _mode(trt, engine, name) for name in map(engine.get_tensor_name, range(engine.num_io_tensors))}
    specs = [(spec, True) for spec in manifest.inputs] + [(spec, False) for spec in manifest.outputs]
    if found != {spec.name: is_input for spec, is_input in specs}:
        raise BundleError(
            f"the engine has {_list_tensors(found)}; the manifest says "
            f"{_list_tensors({spec.name: is_input for spec, is_input in specs})}: export again"
        )
    largest = max(hi for _, hi in map(_batches, record.profiles))
    tensors = [_tensor(trt, engine, spec, largest=largest, is_input=is_input) for spec, is_input in specs]
    _check_native_profiles(engine, record)
    inputs = tuple(tensor for tensor in tensors if tensor.is_input)
    outputs = tuple(tensor for tensor in tensors if not tensor.is_input)
    return LoadedEngine(trt, runtime, engine, record, inputs, outputs)


def _mode(trt: Any, engine: Any, name: str) -> bool:
    return bool(engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)


def _list_tensors(tensors: Mapping[str, bool]) -> str:
    return ", ".join(f"{'input' if is_input else 'output'} {name}" for name, is_input in tensors.items())


def _tensor(trt: Any, engine: Any, spec: TensorSpec, *, largest: int, is_input: bool) -> Tensor:
    kind = engine.get_tensor_dtype(spec.name).name
    shape = tuple(engine.get_tensor_shape(spec.name))
    fixed = tuple(-1 if i == 0 else length for i, length in enumerate(spec.shape))
    if _NUMPY.get(kind) != spec.dtype or shape[1:] != fixed[1:]:
        raise BundleError(
            f"the engine's {spec.name} is {kind.lower()} {shape}; the manifest says {spec.dtype} {fixed}: export again"
        )
    if engine.get_tensor_location(spec.name) != trt.TensorLocation.DEVICE:
        raise BundleError(f"the engine's {spec.name} is in host memory; export again")
    dtype = np.dtype(spec.dtype)
    elements = largest * int(np.prod(shape[1:], dtype=np.int64))
    return Tensor(spec.name, dtype, shape, is_input, elements * dtype.itemsize)


def _check_native_profiles(engine: Any, record: EngineRecord) -> None:
    """Raise unless the engine has the profiles that the manifest says, so that its refusals can be trusted."""
    found = tuple(
        {name: tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, i)) for name in profile}
        for i, profile in enumerate(record.profiles[: engine.num_optimization_profiles])
    )
    if engine.num_optimization_profiles != len(record.profiles) or found != record.profiles:
        raise BundleError("the engine's profiles are not those of the manifest: export again")
