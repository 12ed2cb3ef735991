"""NVIDIA's two builders: what each is for, what it cannot do, and what differs between their versions.

`trt` (package tensorrt) builds for the GPU at hand; `trt-rtx` (package tensorrt-rtx) builds ahead of time on any
machine, for RTX GPUs. What a version can do is asked of its module; no bit and no version number stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from repmlp_deploy.convert.engine_options import FLAGS, EngineOptions
from repmlp_deploy.convert.formats.tensorrt.versions import find_name, has_name
from repmlp_deploy.errors import BuildError, InputError, MissingDependency, MissingDevice
from repmlp_deploy.runtime.tensorrt.driver import LIBRARY, find_gpus
from repmlp_deploy.runtime.tensorrt.flavours import FLAVOURS as RUNTIMES

__all__ = [
    "FLAVOURS",
    "Flavour",
    "capability_name",
    "check_flavour",
    "check_options",
    "creation_flags",
    "target_capabilities",
]


@dataclass(frozen=True)
class Flavour:
    """One of the builders.

    Attributes:
        format: its name on the command line.
        module: its Python module.
        extra: the extra of this project that brings it.
        oldest: the first version whose interface this project uses.
        needs_gpu: whether building needs a GPU.
        needs_gpu_for: options that need one even where building does not.
        lacks: option to the reason why this flavour has none.
        times_kernels: whether its builder measures kernels, so that a timing cache saves time.
    """

    format: str
    module: str
    extra: str
    oldest: tuple[int, int]
    needs_gpu: bool
    needs_gpu_for: tuple[str, ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)
    times_kernels: bool = False


FLAVOURS = {
    "trt": Flavour(
        "trt",
        RUNTIMES["trt"].module,
        RUNTIMES["trt"].extra,
        oldest=(10, 13),
        needs_gpu=True,
        lacks={"compute_capabilities": "it builds for the GPU at hand; trt-rtx builds for GPUs that are named"},
        times_kernels=True,
    ),
    "trt-rtx": Flavour(
        "trt-rtx",
        RUNTIMES["trt-rtx"].module,
        RUNTIMES["trt-rtx"].extra,
        oldest=(1, 2),
        needs_gpu=False,
        needs_gpu_for=("refittable", "strip_weights"),
        lacks={
            "timing_cache": "it measures nothing, and would look for a GPU; kernels are chosen where the engine runs",
            "version_compatible": "its engines run in the release that built them: build again for another",
            "hardware_compatible": "name the GPUs with --compute-capability; one engine may be for several",
        },
    ),
}

_NEEDS = {
    "workspace_gb": "MemoryPoolType.WORKSPACE",
    "tf32": "BuilderFlag.TF32",
    "optimization_level": "IBuilderConfig.builder_optimization_level",
    "timing_cache": "IBuilderConfig.create_timing_cache",
    "version_compatible": "BuilderFlag.VERSION_COMPATIBLE",
    "hardware_compatible": "HardwareCompatibilityLevel.AMPERE_PLUS",
    "compute_capabilities": "IBuilderConfig.set_compute_capability",
    "refittable": "BuilderFlag.REFIT",
    "strip_weights": "BuilderFlag.STRIP_PLAN",
}
"""Option to what a module must have for it."""


def check_flavour(name: str) -> Any:
    """Import the flavour's module, if an engine can be built here.

    Raises:
        BuildError: the installed version is too old.
        MissingDependency: its package is not installed.
        MissingDevice: it needs a GPU and there is none.
    """
    flavour = FLAVOURS[name]
    if flavour.needs_gpu and not find_gpus():
        raise MissingDevice(
            f"{name} builds on the GPU it is for, and this machine has no NVIDIA driver ({LIBRARY}) with a GPU: run on "
            "the target, or use --format trt-rtx, which builds for RTX GPUs without one"
        )
    try:
        trt = import_module(flavour.module)
    except ImportError:
        raise MissingDependency(flavour.module, flavour.extra) from None
    if tuple(int(part) for part in trt.__version__.split(".")[:2]) < flavour.oldest:
        oldest = ".".join(map(str, flavour.oldest))
        raise BuildError(
            f"{flavour.module} is {trt.__version__}; {oldest} is the oldest that builds here: "
            f'pip install --upgrade "repmlp-deploy[{flavour.extra}]"'
        )
    return trt


def check_options(name: str, options: EngineOptions) -> Any:
    """Import the flavour's module, if it can build an engine with these options here.

    Raises:
        InputError: the flavour or its version does not have an option; the message says why.
        BuildError, MissingDependency, MissingDevice: as `check_flavour`; the last also where an option needs a GPU.
    """
    flavour = FLAVOURS[name]
    asked = [option for option in options.asked() if (option, options.timing_cache) != ("timing_cache", "off")]
    for option in asked:
        if option in flavour.lacks:
            raise InputError(f"{name} has no {FLAGS[option]}: {flavour.lacks[option]}")
    trt = check_flavour(name)
    for option in asked:
        if option in _NEEDS and not has_name(trt, _NEEDS[option]):
            raise InputError(f"{flavour.module} {trt.__version__} has no {FLAGS[option]}: it has no {_NEEDS[option]}")
    for capability in options.compute_capabilities:
        if not has_name(trt, f"ComputeCapability.{capability_name(capability)}"):
            known = ", ".join(_capabilities(trt))
            raise InputError(f"{flavour.module} {trt.__version__} cannot build for {capability}; it can for {known}")
    needy = [option for option in asked if option in flavour.needs_gpu_for]
    if needy and not find_gpus():
        raise MissingDevice(
            f"{name} builds without a GPU, but {FLAGS[needy[0]]} needs an NVIDIA driver with one, and this machine has "
            "none: leave it out, or build on the target"
        )
    return trt


def creation_flags(trt: Any) -> int:
    """Return the flags of a strongly typed network with an explicit batch, as far as the version has flags for them."""
    names = ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH")
    flags = [find_name(trt, name) for name in names]
    return sum(1 << int(flag) for flag in flags if flag is not None)


def capability_name(capability: str) -> str:
    """Return `SM86` of `8.6`."""
    return "SM" + capability.replace(".", "")


def target_capabilities(name: str, options: EngineOptions) -> list[str] | None:
    """Return the compute capabilities an engine is for; None if the builder chooses them itself."""
    if FLAVOURS[name].needs_gpu:
        return [find_gpus()[0].capability]
    return list(options.compute_capabilities) or None


def _capabilities(trt: Any) -> list[str]:
    """Return the capabilities that can be named, such as `8.6`."""
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    numbers = [name.removeprefix("SM") for name in members if name.startswith("SM")]
    return [f"{number[:-1]}.{number[-1]}" for number in numbers]
