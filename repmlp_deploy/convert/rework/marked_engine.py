"""Values inside an engine: it is built again from the graph with these values marked as outputs, and run on this GPU.

An engine keeps no layer's output of its own. So the graph gets other outputs: every value that is asked for, in
float32 and with its axes joined to (N, rest), because a value such as FC3's (S, N, h·w) does not begin with the batch.
The batch is fixed, so that all shapes are known. An output ends a fusion: the marked engine computes what the served
one does, but not with the same kernels, and a fault of a fused kernel may be gone from it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.bundle import BatchRange, Bundle, TensorSpec
from repmlp_deploy.convert.diagnosis.bisect import Compute
from repmlp_deploy.convert.engine_options import EngineOptions
from repmlp_deploy.convert.formats.tensorrt.build import Engine, GraphSpec, build_engine
from repmlp_deploy.convert.formats.tensorrt.flavours import FLAVOURS, check_flavour
from repmlp_deploy.convert.graph.proto import large_weights, serialize_model, without_weights
from repmlp_deploy.convert.rework.add_engine import engine_entry, graph_spec
from repmlp_deploy.errors import MissingDependency, MissingDevice
from repmlp_deploy.runtime.runner import RunnerOptions
from repmlp_deploy.runtime.tensorrt.driver import find_gpus
from repmlp_deploy.runtime.tensorrt.runner import TensorRTRunner

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["MarkedGraph", "build_marked", "compute_in_engine", "mark_outputs"]

_ROWS = "marked_rows"  # the shape (N, rest) that every marked value takes


@dataclass(frozen=True)
class MarkedGraph:
    """A graph whose outputs are values of another one.

    Attributes:
        data: the graph, serialized.
        batch: the size that it is fixed to.
        shapes: value to its own shape, in the order of the outputs; a value without a known shape is left out.
    """

    data: bytes
    batch: int
    shapes: dict[str, tuple[int, ...]]

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Return the graph's outputs, (N, rest) in float32."""
        sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in self.shapes.items()}
        return tuple(
            TensorSpec(name=_marked(name), shape=(None, size // self.batch), dtype="float32")
            for name, size in sizes.items()
        )

    def restored(self, answer: Sequence[NDArray[Any]], names: Sequence[str]) -> list[NDArray[Any]]:
        """Return the values of `names` in their own shapes; one without a known shape has no axes."""
        found = {name: rows.reshape(shape) for (name, shape), rows in zip(self.shapes.items(), answer, strict=True)}
        return [found.get(name, np.zeros((), np.float32)) for name in names]


def mark_outputs(graph: bytes, names: Sequence[str], batch: int) -> MarkedGraph:
    """Return a graph of one batch size whose outputs are the values of `names`."""
    model = onnx.load_model_from_string(graph)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].Clear()
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    shapes = _shapes(model, names)
    del model.graph.output[:]
    model.graph.initializer.append(numpy_helper.from_array(np.array([batch, -1], np.int64), _ROWS))
    for name, shape in shapes.items():
        wide, marked = f"{name}_wide", _marked(name)
        rows = int(np.prod(shape, dtype=np.int64)) // batch
        model.graph.node.append(helper.make_node("Cast", [name], [wide], name=wide, to=TensorProto.FLOAT))
        model.graph.node.append(helper.make_node("Reshape", [wide, _ROWS], [marked], name=marked))
        model.graph.output.append(helper.make_tensor_value_info(marked, TensorProto.FLOAT, [batch, rows]))
    return MarkedGraph(serialize_model(model), batch, shapes)


def build_marked(name: str, marked: MarkedGraph, spec: GraphSpec, options: EngineOptions | None = None) -> Engine:
    """Build the engine of a marked graph.

    Args:
        name: an entry of `FLAVOURS`.
        marked: the graph.
        spec: what is known of the graph that it was made from.
        options: how to build.

    Raises:
        BuildError, InputError, MissingDependency, MissingDevice, VerificationError: as `build_engine`.
    """
    fixed = BatchRange(min=marked.batch, opt=marked.batch, max=marked.batch)
    return build_engine(name, marked.data, replace(spec, batch=fixed), options)


def compute_in_engine(name: str, bundle: Bundle) -> Compute:
    """Return what computes values of a bundle's graph in engines that are built for the GPU of this machine.

    Args:
        name: an entry of `FLAVOURS`.
        bundle: holds the graph.

    Raises:
        MissingDependency: the flavour's package is not installed.
        MissingDevice: there is no GPU.
    """
    gpus = find_gpus()
    if not gpus:
        raise MissingDevice(
            f"bisecting a {name} engine runs it, and this machine has no NVIDIA GPU: run on the target, or bisect the "
            "graph it was built from with --format onnx"
        )
    check_flavour(name)
    spec = graph_spec(bundle)
    targets = () if FLAVOURS[name].needs_gpu else (gpus[0].capability,)
    options = EngineOptions(compute_capabilities=targets, timing_cache="off")

    def compute(graph: bytes, inputs: Sequence[NDArray[Any]], names: Sequence[str]) -> list[NDArray[Any]]:
        marked = mark_outputs(graph, names, len(inputs[0]))
        engine = build_marked(name, marked, spec, options)
        made = _bundle_of(name, engine, marked, bundle)
        with tempfile.TemporaryDirectory(prefix="repmlp-bisect-") as folder:  # of kernels that nobody needs again
            runner = TensorRTRunner(made, RunnerOptions(cache=Path(folder)), artifact_format=name)
            try:
                return marked.restored(runner.run_all(*inputs), names)
            finally:
                runner.close()

    return compute


def _bundle_of(name: str, engine: Engine, marked: MarkedGraph, bundle: Bundle) -> Bundle:
    """Return a bundle in memory of the marked engine alone."""
    entry = engine_entry(name, engine, bundle.artifact("onnx").precision)
    size = BatchRange(min=marked.batch, opt=marked.batch, max=marked.batch)
    about = {"artifacts": {name: entry}, "outputs": marked.outputs(), "batch": size}
    return Bundle(bundle.manifest.model_copy(update=about), contents={entry.path: engine.plan})


def _marked(name: str) -> str:
    return f"{name}_marked"


def _shapes(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of those values whose every edge is known."""
    small = without_weights(model, large_weights(model), as_inputs=True)
    del small.graph.output[:]  # further outputs have no type yet
    inferred = onnx.shape_inference.infer_shapes(small, data_prop=True).graph
    known = {}
    for value in (*inferred.value_info, *inferred.input):
        edges = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(edge.HasField("dim_value") for edge in edges):
            known[value.name] = tuple(int(edge.dim_value) for edge in edges)
    return {name: known[name] for name in dict.fromkeys(names) if name in known}
