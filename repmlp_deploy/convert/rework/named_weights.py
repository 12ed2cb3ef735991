"""From a network to the named weights of a graph that was exported from one like it.

The exporter names an initializer as the network names its parameter, and TensorRT's parser names an engine's weights as
the graph names its initializers. So a network of the same architecture has every weight of the graph, and of an engine
built from it, under the same name: unchanged in float32, in a lower precision with the type after the name. One thing
loses its name on the way, the slopes of a PReLU, which the exporter reshapes to (C, 1, 1): they are found by the module
that the node which reads them came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.convert.graph.lowering.names import parameter_of
from repmlp_deploy.convert.graph.nodes import module_of
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.errors import CheckpointError, InputError, MissingDependency
from repmlp_deploy.precision import PRECISIONS, Precision

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["named_weights", "with_named_weights"]


def named_weights(
    state: Mapping[str, NDArray[np.float32]], graph: onnx.ModelProto, *, name: str = "checkpoint"
) -> dict[str, NDArray[Any]]:
    """Return the weights of another network under the names and in the types of a graph's initializers.

    Args:
        state: the traced network's parameters and buffers by name.
        graph: exported from a network of the same architecture, in fp32, fp16 or bf16.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: it is of another architecture: a weight is missing, unused or of another shape.
        InputError: the graph is in 8 bits: its scales were measured with one checkpoint.
    """
    kinds = [_precision_of(tensor) for tensor in graph.graph.initializer]
    if any(kind is not None and kind.lowering == "quantize" for kind in kinds):
        raise InputError("8-bit graphs hold scales that were measured with one checkpoint: export the new one instead")
    found: dict[str, NDArray[Any]] = {}
    unused, slopes = set(state), _slopes(graph)
    for tensor, kind in zip(graph.graph.initializer, kinds, strict=True):
        if kind is None:
            continue
        named = tensor.name if kind.lowering == "none" else parameter_of(tensor.name)
        parameter = slopes.get(tensor.name) or named
        if parameter not in state:
            raise CheckpointError(f"{name} is of another architecture: it has no {parameter}, which the graph reads")
        value = state[parameter]
        if tensor.name in slopes and value.size == tensor.dims[1]:
            value = value.reshape(tuple(tensor.dims))
        if value.shape != tuple(tensor.dims):
            raise CheckpointError(
                f"{name} is of another architecture: {parameter} has shape {value.shape}; "
                f"the graph has {tuple(tensor.dims)}"
            )
        found[tensor.name] = _in_type(value, tensor, kind, name)
        unused.discard(parameter)
    if unused:
        raise CheckpointError(f"{name} is of another architecture: the graph reads no {min(unused)}")
    return found


def _slopes(graph: onnx.ModelProto) -> dict[str, str]:
    """Map initializers to parameters, for the slopes of PReLUs."""
    return {node.input[1]: f"{module_of(node)}.weight" for node in graph.graph.node if node.op_type == "PRelu"}


def with_named_weights(graph: onnx.ModelProto, weights: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the graph, serialized, with other values in the initializers of these names; `graph` is unchanged."""
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(weights[t.name]), t.name) if t.name in weights else t
        for t in graph.graph.initializer
    ]
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    del result.graph.initializer[:]
    result.graph.initializer.extend(tensors)
    return serialize_model(result)


def _precision_of(tensor: TensorProto) -> Precision | None:
    """Return the first precision whose weights have the type of an initializer; None for indices and the like."""
    kind = TensorProto.DataType.Name(tensor.data_type)
    return next((entry for entry in PRECISIONS.values() if entry.onnx_type == kind), None)


def _in_type(value: NDArray[np.float32], tensor: TensorProto, kind: Precision, name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        low = value.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if not np.isfinite(low.astype(np.float32)).all():
        end = f"{kind.element}'s {kind.largest:g}"
        raise CheckpointError(f"{name}: {tensor.name} holds {float(np.abs(value).max()):.3g}, beyond {end}")
    return low
