"""A graph that takes 8-bit images and normalises them itself.

With levels u, mean m and deviation s of a channel, the network's input is x = (u - m) / s. Where the first node is a
convolution without padding, it takes the levels, centred so that every precision holds them exactly:

    W x + b = (W / s) (u - 128) + b + sum over (c, i, j) of W (128 - m) / s

Beyond the border of a padded convolution lies x = 0, which is the mean and no level that a bias could make
up for. There the graph computes (u - m) / s as preprocessing does, operation by operation, to the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.card import Preprocessing
from repmlp_deploy.convert.graph.lowering.names import parameter_of
from repmlp_deploy.errors import MissingDependency

try:
    import onnx
    from onnx import NodeProto, TensorProto, helper, numpy_helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["level_kernel", "level_weights", "with_level_input"]

_CENTRE = 128.0
_CHANNELS_FIRST = (0, 3, 1, 2)
_BIASED = 3  # inputs of a convolution with a bias


def with_level_input(graph: onnx.ModelProto, how: Preprocessing) -> tuple[onnx.ModelProto, str]:
    """Return a copy of `graph` whose input is (N, H, W, C) uint8, and a note on where the normalisation is.

    Args:
        graph: float32, with one input (N, C, H, W) and simplified.
        how: mean, std and the order of the network's channels. The levels are in RGB order.
    """
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    name = made.graph.input[0].name
    normal = f"{name}_normalised"
    first = _first_convolution(made.graph, name)
    for node in made.graph.node:
        for i, read in enumerate(node.input):
            if read == name:
                node.input[i] = normal
    if first is not None:
        _fold(made.graph, first, how)
        before, note = _centred(made.graph, name, normal), "folded into the first convolution"
    else:
        before, note = (
            _affine(made.graph, name, normal, how),
            "at the input, as the first convolution is padded or absent",
        )
    nodes = [*before, *made.graph.node]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    _retype_input(made.graph.input[0])
    return made, f"uint8 images: the normalisation is {note}"


def level_kernel(
    weight: NDArray[Any], bias: NDArray[Any] | None, how: Preprocessing
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a convolution's weight and bias for centred levels, for those it has for normalised inputs.

    Args:
        weight: (O, C, h, w).
        bias: (O,), or None.
        how: see `with_level_input`.
    """
    mean, std = (np.asarray(values, np.float64)[:, None, None] for values in (how.mean, how.std))
    kernel = weight.astype(np.float64) / std  # (O, C, h, w), float64: rounded once
    shift = (kernel * (_CENTRE - mean)).sum(axis=(1, 2, 3)) + (0 if bias is None else bias)
    kernel = kernel[:, ::-1] if how.colour_order == "BGR" else kernel
    return np.ascontiguousarray(kernel, np.float32), shift.astype(np.float32)


def level_weights(
    state: Mapping[str, NDArray[Any]], graph: onnx.ModelProto, how: Preprocessing
) -> dict[str, NDArray[Any]]:
    """Return the weights of a network as a graph of `with_level_input` holds them, and the constants at its input.

    Args:
        state: weights by name, for normalised inputs.
        graph: of a network of the same architecture, in fp32, fp16 or bf16.
        how: see `with_level_input`.
    """
    name = graph.graph.input[0].name
    constants = {tensor.name: parameter_of(tensor.name) for tensor in graph.graph.initializer}
    given = {f"{name}_centre": np.asarray([_CENTRE], np.float32)}
    for kind, values in (("mean", how.mean), ("std", how.std)):
        given[f"{name}_{kind}"] = np.asarray(values, np.float32)[:, None, None]
    found = {**state, **{key: value for key, value in given.items() if key in constants.values()}}
    if f"{name}_centre" not in found:
        return found
    casts = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "Cast"}
    reads = [(node, casts.get(node.input[0], node.input[0])) for node in graph.graph.node if node.op_type == "Conv"]
    convolution = next(node for node, source in reads if source == f"{name}_normalised")
    weight, bias = (constants[casts.get(read, read)] for read in convolution.input[1:])
    if weight not in state:  # the network is of another architecture, which the caller says
        return found
    found[weight], shift = level_kernel(state[weight], state.get(bias), how)
    if bias in state or bias == _bias_of(weight):  # another one was fused of a BatchNorm: not the convolution's
        found[bias] = shift
    return found


def _bias_of(weight: str) -> str:
    """Return the name of the bias that a convolution without one gets."""
    return f"{weight}_level_bias"


def _first_convolution(graph: onnx.GraphProto, name: str) -> NodeProto | None:
    """Return the unpadded convolution that alone reads the input, if its weights are its own."""
    reads = [read for node in graph.node for read in node.input]
    readers = [node for node in graph.node if name in node.input]
    if len(readers) != 1 or readers[0].op_type != "Conv" or name in {value.name for value in graph.output}:
        return None
    constants = {tensor.name: tensor for tensor in graph.initializer}
    own = [read for read in readers[0].input[1:] if read]
    if any(read not in constants or reads.count(read) != 1 for read in own):
        return None
    said = {attribute.name: helper.get_attribute_value(attribute) for attribute in readers[0].attribute}
    padded = any(said.get("pads", ())) or said.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    return None if padded or said.get("group", 1) != 1 else readers[0]


def _fold(graph: onnx.GraphProto, convolution: NodeProto, how: Preprocessing) -> None:
    """Give a convolution the weights and the bias for centred levels, in place."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    weight = constants[convolution.input[1]]
    biased = len(convolution.input) == _BIASED and convolution.input[2]
    held = numpy_helper.to_array(constants[convolution.input[2]]) if biased else None
    kernel, bias = level_kernel(numpy_helper.to_array(weight), held, how)
    weight.CopyFrom(_tensor(weight.name, kernel))
    if biased:
        constants[convolution.input[2]].CopyFrom(_tensor(convolution.input[2], bias))
        return
    del convolution.input[2:]
    convolution.input.append(_bias_of(weight.name))
    graph.initializer.append(_tensor(convolution.input[2], bias))


def _centred(graph: onnx.GraphProto, name: str, result: str) -> list[NodeProto]:
    graph.initializer.append(_tensor(f"{name}_centre", np.asarray(_CENTRE)))
    subtracted = helper.make_node("Sub", [f"{name}_levels", f"{name}_centre"], [result], name=f"{name}/Sub")
    return [*_as_maps(name, f"{name}_levels"), subtracted]


def _affine(graph: onnx.GraphProto, name: str, result: str, how: Preprocessing) -> list[NodeProto]:
    nodes, levels = _as_maps(name, f"{name}_levels"), f"{name}_levels"
    if how.colour_order == "BGR":
        graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0], np.int64), f"{name}_order"))
        turned = helper.make_node("Gather", [levels, f"{name}_order"], [f"{name}_bgr"], name=f"{name}/Gather", axis=1)
        nodes, levels = [*nodes, turned], f"{name}_bgr"
    for kind, values in (("mean", how.mean), ("std", how.std)):
        graph.initializer.append(_tensor(f"{name}_{kind}", np.asarray(values)[:, None, None]))
    return [
        *nodes,
        helper.make_node("Sub", [levels, f"{name}_mean"], [f"{name}_shifted"], name=f"{name}/Sub"),
        helper.make_node("Div", [f"{name}_shifted", f"{name}_std"], [result], name=f"{name}/Div"),
    ]


def _as_maps(name: str, result: str) -> list[NodeProto]:
    """Return the nodes from (N, H, W, C) uint8 to (N, C, H, W) float32: TensorRT takes uint8 only to cast it."""
    cast = helper.make_node("Cast", [name], [f"{name}_cast"], name=f"{name}/Cast", to=TensorProto.FLOAT)
    turned = helper.make_node("Transpose", [f"{name}_cast"], [result], name=f"{name}/Transpose", perm=_CHANNELS_FIRST)
    return [cast, turned]


def _retype_input(value: onnx.ValueInfoProto) -> None:
    """Make (N, C, H, W) float32 (N, H, W, C) uint8, in place."""
    kind = value.type.tensor_type
    batch, channels, height, width = (copy.deepcopy(edge) for edge in kind.shape.dim)
    del kind.shape.dim[:]
    kind.shape.dim.extend([batch, height, width, channels])
    kind.elem_type = TensorProto.UINT8


def _tensor(name: str, values: NDArray[Any]) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name)
