"""TensorRT engines from a verified ONNX graph: one code path for both flavours, chosen by a table.

`trt` (package tensorrt) builds for the GPU at hand; `trt-rtx` (package tensorrt-rtx) builds ahead of time on any
machine, for RTX GPUs. Precision is a property of the graph: networks are strongly typed.
"""

from __future__ import annotations

import ctypes.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.errors import BuildError, MissingDependency, MissingDevice

__all__ = ["FLAVOURS", "Engine", "Flavour", "build_engine", "check_flavour"]


@dataclass(frozen=True)
class Flavour:
    """One of NVIDIA's two builders.

    Attributes:
        format: its name on the command line.
        module: its Python module.
        extra: the extra of this project that brings it.
        needs_gpu: whether building needs a GPU.
    """

    format: str
    module: str
    extra: str
    needs_gpu: bool


FLAVOURS = {
    "trt": Flavour("trt", "tensorrt", "trt", needs_gpu=True),
    "trt-rtx": Flavour("trt-rtx", "tensorrt_rtx", "rtx", needs_gpu=False),
}


@dataclass(frozen=True)
class Engine:
    """A serialized engine: the raw plan, as vendor tools read it.

    Attributes:
        plan: the bytes.
        details: flavour, version, profile, layer types, build time and the builder's warnings.
    """

    plan: bytes
    details: dict[str, Any]


def check_flavour(name: str) -> Any:
    """The flavour's module, when an engine can be built here.

    Raises:
        MissingDependency: its package is not installed.
        MissingDevice: it needs a GPU and there is no driver.
    """
    flavour = FLAVOURS[name]
    if flavour.needs_gpu and ctypes.util.find_library("cuda") is None:
        raise MissingDevice(
            f"{name} builds on the GPU it is for, and this machine has no NVIDIA driver (libcuda): run on the target, "
            "or use --format trt-rtx, which builds for RTX GPUs without one"
        )
    try:
        return import_module(flavour.module)
    except ImportError:
        raise MissingDependency(flavour.module, flavour.extra) from None


def build_engine(name: str, graph: bytes, *, inputs: Mapping[str, Sequence[int]], batch: BatchRange) -> Engine:
    """The engine of a serialized ONNX graph.

    Args:
        name: an entry of `FLAVOURS`.
        graph: the model, weights inside.
        inputs: name of every input to its shape without the batch, (C, H, W).
        batch: the optimisation profile.

    Raises:
        BuildError: the parser or the builder refuses the graph; the message names the node.
        MissingDependency: the flavour's package is not installed.
        MissingDevice: it needs a GPU.
    """
    trt = check_flavour(name)
    started = time.perf_counter()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_creation_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        raise BuildError(f"{name} cannot parse the graph: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    ranges = {key: [[n, *shape] for n in (batch.min, batch.opt, batch.max)] for key, shape in inputs.items()}
    for key, shapes in ranges.items():
        profile.set_shape(key, *map(tuple, shapes))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        said = logger.errors[-1] if logger.errors else "no message"
        raise BuildError(f"{name} could not build the engine: {said}")
    details = {
        "flavour": name,
        "version": trt.__version__,
        "profile": ranges,
        "layers": network.num_layers,
        "layer_types": _layer_types(network),
        "build_seconds": round(time.perf_counter() - started, 2),
        "warnings": logger.warnings,
    }
    return Engine(bytes(plan), details)


def _creation_flags(trt: Any) -> int:
    """Strongly typed where that is still a choice, explicit batch where that still has a name."""
    flags = 0
    for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH"):
        flag = getattr(trt.NetworkDefinitionCreationFlag, name, None)
        flags |= 0 if flag is None else 1 << int(flag)
    return flags


def _logger(trt: Any) -> Any:
    """A logger that keeps warnings and errors instead of printing them."""

    class Kept(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warnings: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Kept()


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"node {e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors) or "no message"


def _layer_types(network: Any) -> dict[str, int]:
    """How many layers give each data type."""
    counts: dict[str, int] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.num_outputs:
            name = layer.get_output(0).dtype.name.lower()
            counts[name] = counts.get(name, 0) + 1
    return counts
