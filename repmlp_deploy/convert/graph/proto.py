"""Large weights in ONNX protobufs, moved as rarely as possible.

The protobuf runtime grows one buffer until it holds the whole model, which takes longer than anything else done to a
graph of hundreds of megabytes. A message is its fields one after the other, each a tag, a length and its bytes, so
the weights can be put where they belong without going through that buffer.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import onnx

from repmlp_deploy.runtime.onnx.weights import field_head

__all__ = [
    "LARGE_BYTES",
    "SCOPES",
    "copy_graph",
    "large_weights",
    "restore_weights",
    "serialize_model",
    "without_weights",
]

LARGE_BYTES = 1 << 16

SCOPES = "pkg.torch.onnx.name_scopes"
"""What the exporter notes on a node: the modules it came from, the outermost first, and its own name."""

_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER


def copy_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model, weights included."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def large_weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Return the initializers of at least `LARGE_BYTES`."""
    return [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= LARGE_BYTES]


def without_weights(model: onnx.ModelProto, weights: Sequence[onnx.TensorProto], *, as_inputs: bool) -> onnx.ModelProto:
    """Return a copy of `model` without `weights`; with `as_inputs` each is an input of the graph instead."""
    names = {tensor.name for tensor in weights}
    result = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _set(result, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _set(result.graph, field.name, value)
    result.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in names)
    if as_inputs:
        for tensor in weights:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            result.graph.input.append(value)
    return result


def restore_weights(model: onnx.ModelProto, weights: Sequence[onnx.TensorProto]) -> None:
    """Turn those inputs of `model` that stand for `weights` back into initializers, in place."""
    names = {tensor.name for tensor in weights}
    inputs = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(tensor for tensor in weights if tensor.name in read)


def serialize_model(model: onnx.ModelProto) -> bytes:
    """Return `model.SerializeToString()`, in a third of the time if weights are large."""
    weights = large_weights(model)
    if not weights:
        data: bytes = model.SerializeToString()
        return data
    small = without_weights(model, weights, as_inputs=False)
    graph = small.graph.SerializeToString()
    small.ClearField("graph")
    heads = [_initializer_head(tensor) for tensor in weights]
    length = len(graph) + sum(len(head) + nbytes for head, nbytes in heads)
    start = small.SerializeToString() + field_head(_GRAPH, length) + graph
    buffer = io.BytesIO()
    buffer.seek(len(start) - len(graph) + length - 1)
    buffer.write(b"\0")  # all the memory it takes, at once: a buffer that grows is copied each time
    buffer.seek(0)
    buffer.write(start)
    for tensor, (head, _) in zip(weights, heads, strict=True):
        buffer.write(head)
        buffer.write(tensor.raw_data)  # a copy, every time: one weight's is in memory, not all of them
    return buffer.getvalue()


def _initializer_head(tensor: onnx.TensorProto) -> tuple[bytes, int]:
    """Return what precedes a weight's bytes in a graph's initializer field, and the number of these bytes."""
    about = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims).SerializeToString()
    nbytes = len(tensor.raw_data)
    raw_head = field_head(_RAW_DATA, nbytes)
    return field_head(_INITIALIZER, len(about) + len(raw_head) + nbytes) + about + raw_head, nbytes


def _set(message: object, name: str, value: object) -> None:
    """Copy a field's value, whatever its kind."""
    field = getattr(message, name)
    if hasattr(field, "extend"):
        field.extend(value)
    elif hasattr(field, "CopyFrom"):
        field.CopyFrom(value)
    else:
        setattr(message, name, value)
