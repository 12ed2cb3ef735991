"""TensorRT engines from a verified ONNX graph: one code path for both flavours, chosen by a table.

Precision is a property of the graph: networks are strongly typed, and their types are read back.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.engine_options import FLAGS, EngineOptions
from repmlp_deploy.convert.formats.tensorrt.flavours import (
    FLAVOURS,
    capability_name,
    check_options,
    creation_flags,
    target_capabilities,
)
from repmlp_deploy.convert.formats.tensorrt.network_types import read_types, require_precision
from repmlp_deploy.convert.formats.tensorrt.timing_cache import TimingCache, default_timing_cache
from repmlp_deploy.errors import BuildError, InputError, MissingDependency, OutputError
from repmlp_deploy.runtime.tensorrt.driver import find_gpus
from repmlp_deploy.runtime.tensorrt.log import recording, shared_logger

__all__ = ["NOT_RUN", "Engine", "GraphSpec", "build_engine"]

NOT_RUN = "the {} engine was built from the verified graph and has not run here"


@dataclass(frozen=True)
class GraphSpec:
    """What is known of a graph that an engine is built from.

    Attributes:
        inputs: name of every input to its shape without the batch, (C, H, W).
        batch: sizes that the graph serves.
        precision: what its products multiply in.
        kept_fp32: products that stay in float32, by name.
    """

    inputs: Mapping[str, Sequence[int]]
    batch: BatchRange
    precision: str = "fp32"
    kept_fp32: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """A serialized engine: the raw plan, as vendor tools read it.

    Attributes:
        plan: the bytes.
        details: flavour, version, targets, profiles, options, layers and their types, memory, build time, warnings.
    """

    plan: bytes
    details: dict[str, Any]


def build_engine(name: str, graph: bytes, spec: GraphSpec, options: EngineOptions | None = None) -> Engine:
    """Build the engine of a serialized ONNX graph.

    Args:
        name: an entry of `FLAVOURS`.
        graph: the model, weights inside.
        spec: what is known of it.
        options: how to build; by default as `EngineOptions` says.

    Raises:
        BuildError: the parser or the builder refuses the graph; the message names the node and its module.
        InputError: the flavour does not have an option, or a profile is beyond what the graph serves.
        MissingDependency: the flavour's package is not installed.
        MissingDevice: it, or an option, needs a GPU.
        OutputError: the timing cache cannot be written.
        VerificationError: a product has another type than the graph was asked for in.
    """
    options = options or EngineOptions()
    trt = check_options(name, options)
    profiles = _profiles(spec, options)
    started = time.perf_counter()
    name_node = _NodeNames(graph)
    with recording(trt, options.verbosity) as said:
        builder = trt.Builder(shared_logger(trt))
        network = builder.create_network(creation_flags(trt))
        parser = trt.OnnxParser(network, shared_logger(trt))
        if not parser.parse(graph):
            raise BuildError(f"{name} cannot parse the graph: {_parser_errors(parser, name_node)}")
        types = read_types(network)
        require_precision(types, spec.precision, where=name, kept=spec.kept_fp32, describe=name_node)
        config = _configured(trt, builder, options)
        for ranges in profiles:
            _add_profile(builder, config, ranges)
        cache = _timing_cache(name, trt, options, said.warnings)
        if cache is not None:
            cache.attach(config)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            errors = name_node.explain(said.errors[-1]) if said.errors else "no message"
            raise BuildError(f"{name} could not build the engine: {errors}")
        if cache is not None:
            cache.save(config)
        del parser, network, config, builder  # their copies of the weights, before there is another of the plan
    details = {
        "flavour": name,
        "version": trt.__version__,
        "compute_capabilities": target_capabilities(name, options),
        "profiles": profiles,
        "options": _described(options),
        "timing_cache": None if cache is None else cache.state,
        **types.describe(),
        **{f"{kind}_bytes": size for kind, size in said.memory.items()},
        "build_seconds": round(time.perf_counter() - started, 2),
        "warnings": said.warnings,
    }
    return Engine(bytes(plan), details)


def _profiles(spec: GraphSpec, options: EngineOptions) -> list[dict[str, list[list[int]]]]:
    """Return one entry per profile: name of every input to its smallest, best and largest shape."""
    for profile in options.profiles:
        if not spec.batch.min <= profile.min <= profile.opt <= profile.max <= spec.batch.max:
            raise InputError(
                f"--batch {profile.min}:{profile.opt}:{profile.max} is beyond what the graph was verified for, "
                f"{spec.batch.min} to {spec.batch.max}: export it for these sizes"
            )
    return [
        {key: [[n, *shape] for n in (batch.min, batch.opt, batch.max)] for key, shape in spec.inputs.items()}
        for batch in options.profiles or (spec.batch,)
    ]


def _configured(trt: Any, builder: Any, options: EngineOptions) -> Any:
    """Set the builder's configuration and read every value back, because builders clamp silently."""
    config = builder.create_builder_config()
    flags = {
        "TF32": options.tf32,
        "REFIT": options.refittable,
        "STRIP_PLAN": options.strip_weights,
        "VERSION_COMPATIBLE": options.version_compatible,
    }
    for name, wanted in flags.items():
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is not None and config.get_flag(flag) != wanted:
            (config.set_flag if wanted else config.clear_flag)(flag)
    if options.workspace_gb is not None:
        size = int(options.workspace_gb * (1 << 30))
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
        _require_taken("workspace_gb", size, config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
        _require_taken("optimization_level", options.optimization_level, config.builder_optimization_level)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for i, capability in enumerate(options.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability_name(capability)), i)
    return config


def _require_taken(option: str, asked: int, taken: int) -> None:
    if asked != taken:
        raise InputError(f"{FLAGS[option]}: {asked} was asked for; the builder takes {taken}")


def _add_profile(builder: Any, config: Any, ranges: Mapping[str, Sequence[Sequence[int]]]) -> None:
    profile = builder.create_optimization_profile()
    for key, shapes in ranges.items():
        profile.set_shape(key, *map(tuple, shapes))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"the builder refuses the profile {ranges}")


def _timing_cache(name: str, trt: Any, options: EngineOptions, warnings: list[str]) -> TimingCache | None:
    """Return the cache to use; None if the flavour measures nothing, none is asked for, or no folder can be written."""
    flavour = FLAVOURS[name]
    if options.timing_cache == "off" or not flavour.times_kernels:
        return None
    if options.timing_cache != "auto":
        return TimingCache(Path(options.timing_cache))
    try:
        return TimingCache(default_timing_cache(flavour.module, trt.__version__, find_gpus()[0].capability))
    except OutputError as error:
        warnings.append(f"no timing cache: {error}")
        return None


def _described(options: EngineOptions) -> dict[str, Any]:
    """Return the options that shape the engine, for the manifest."""
    names = (
        "workspace_gb",
        "tf32",
        "optimization_level",
        "version_compatible",
        "hardware_compatible",
        "refittable",
        "strip_weights",
    )
    return {name: getattr(options, name) for name in names}


class _NodeNames:
    """How messages call a node: with the module it came from. The graph is read only when something failed."""

    def __init__(self, graph: bytes) -> None:
        self._graph = graph

    def __call__(self, node: str) -> str:
        module = self._modules.get(node)
        return f"node {node}" + (f" of {module}" if module else "")

    def explain(self, message: str) -> str:
        """Return a builder's message, with the modules of the nodes it quotes."""
        quoted = [name for name in re.findall(r"'([^']+)'", message) if name in self._modules]
        return message + "".join(f" ({self(name)})" for name in dict.fromkeys(quoted))

    @cached_property
    def _modules(self) -> dict[str, str]:
        try:
            from repmlp_deploy.convert.graph.nodes import node_modules  # noqa: PLC0415 - onnx is not needed to build
        except MissingDependency:
            return {}
        return node_modules(self._graph)


def _parser_errors(parser: Any, name_node: _NodeNames) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"{name_node(e.node_name())} ({e.node_operator()}): {e.desc()}" for e in errors) or "no message"
