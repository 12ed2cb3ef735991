"""Counting: parameters, multiply-adds and memory traffic of a network or an ONNX graph, from shapes alone.

Conventions.

*Multiply-adds* are those of convolutions and matrix products, one per multiplication; papers call them FLOPs, while
hardware peaks count two operations each. Additions of biases, BatchNorms, activations and pooling are not counted, as in
the published figures.

*Parameters* are trainable tensors: running statistics of BatchNorms are none. In an ONNX graph they are the initializers
of floating-point or 8-bit type.

*Traffic* is what operations read and write if nothing stays in a cache or a register between them: every operation but
a view reads its inputs and writes its outputs. *Least traffic* is what no implementation can avoid: every weight, the
network's input and its output once. The arithmetic intensity that bounds a roofline is taken over the least traffic,
so that no honest measurement can lie above the roof.

All figures but weights are for one image; a batch of N multiplies them by N and reads the weights once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Self

import onnx
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repmlp_deploy.convert.onnx_proto import large_weights, without_weights

__all__ = ["WIDTHS", "Counts", "OpCount", "count_graph", "count_network", "stage_of"]

WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Bytes of one element of a weight or an activation."""

_STAGES = (
    (re.compile(r"(?:^|\.)stages\.(\d+)\."), 0),
    (re.compile(r"(?:^|\.)embeds\.(\d+)\."), 1),  # the convolution that leads into the next stage belongs to it
)
_NAMED_STAGES = {"conv_embedding": "embedding", "head_norm": "head"}


class OpCount(BaseModel):
    """One operation of the network.

    Attributes:
        op: its kind, as PyTorch or ONNX calls it.
        stage: the part of the network it belongs to.
        macs: multiply-adds an image.
        weight_elements: elements of weights it reads.
        activation_elements: elements of activations it reads and writes, an image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: str
    stage: str
    macs: int
    weight_elements: int
    activation_elements: int


class Counts(BaseModel):
    """What a network or a graph consists of and does for one image.

    Attributes:
        parameters: elements of trainable tensors.
        macs: multiply-adds an image.
        weight_elements: elements of weights that are read, once a batch.
        activation_elements: elements that operations read and write, an image.
        io_elements: elements of the network's input and output, an image.
        operations: one entry an operation, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int
    macs: int
    weight_elements: int
    activation_elements: int
    io_elements: int
    operations: tuple[OpCount, ...]

    @classmethod
    def of(cls, parameters: int, io_elements: int, operations: Iterable[OpCount]) -> Self:
        """The sums over `operations`."""
        ops = tuple(operations)
        return cls(
            parameters=parameters,
            macs=sum(op.macs for op in ops),
            weight_elements=sum(op.weight_elements for op in ops),
            activation_elements=sum(op.activation_elements for op in ops),
            io_elements=io_elements,
            operations=ops,
        )

    def traffic_bytes(self, batch: int, precision: str = "fp32") -> int:
        """Bytes that the operations read and write for a batch, none of them kept in a cache."""
        return WIDTHS[precision] * (self.weight_elements + batch * self.activation_elements)

    def least_bytes(self, batch: int, precision: str = "fp32") -> int:
        """Bytes that no implementation can avoid: the weights once, the input and the output."""
        return WIDTHS[precision] * (self.weight_elements + batch * self.io_elements)

    def intensity(self, batch: int, precision: str = "fp32") -> float:
        """Operations (two a multiply-add) per byte of the least traffic."""
        return 2 * self.macs * batch / self.least_bytes(batch, precision)

    def by(self, attribute: str) -> dict[str, int]:
        """Multiply-adds an image, summed by `op` or `stage`, in order of appearance, parts without any left out."""
        sums: dict[str, int] = {}
        for op in self.operations:
            if op.macs:
                key = str(getattr(op, attribute))
                sums[key] = sums.get(key, 0) + op.macs
        return sums


def stage_of(name: str) -> str | None:
    """The stage that a module or weight of this dotted name belongs to; None for a name that says nothing."""
    for pattern, offset in _STAGES:
        match = pattern.search(f"{name}.")
        if match:
            return f"stage {int(match[1]) + offset}"
    first = name.split(".", maxsplit=1)[0]
    if "." not in name and first not in (*_NAMED_STAGES, "head"):
        return None
    return _NAMED_STAGES.get(first, first)


def count_network(network: nn.Module, shape: Sequence[int]) -> Counts:
    """What a PyTorch network does for one image, told from a run without data.

    Args:
        network: in evaluation mode; neither it nor its weights are touched.
        shape: (C, H, W).

    Raises:
        ValueError: it runs a product that is not in the table, so that its multiply-adds would be missing.
    """
    state = {
        name: tensor.detach().to("meta") for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    images = torch.empty((1, *shape), device="meta")
    recorder = _Recorder(state.values())
    hooks = [
        module.register_forward_pre_hook(recorder.entering(stage))
        for name, module in network.named_modules()
        if (stage := stage_of(name)) is not None
    ]
    try:
        with torch.no_grad(), recorder:
            output = torch.func.functional_call(network, state, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Counts.of(parameters, images.numel() + output.numel(), recorder.operations)


class _Recorder(TorchDispatchMode):
    """Keeps an `OpCount` of every operation that runs inside."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = {_storage(weight) for weight in weights}
        self._stage = "input"
        self.operations: list[OpCount] = []

    def entering(self, stage: str) -> Any:
        """A hook that notes the stage of what follows."""

        def hook(_module: nn.Module, _arguments: Any) -> None:
            self._stage = stage

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002, PLW3201 - torch's protocol
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _FREE:
            inputs = [value for value in args if isinstance(value, Tensor)]
            outputs = [v for v in (result if isinstance(result, tuple | list) else [result]) if isinstance(v, Tensor)]
            weights = [value for value in inputs if _storage(value) in self._weights]
            read = sum(value.numel() for value in inputs) - sum(value.numel() for value in weights)
            self.operations.append(
                OpCount(
                    op=name,
                    stage=self._stage,
                    macs=_torch_macs(name, args, outputs),
                    weight_elements=sum(value.numel() for value in weights),
                    activation_elements=read + sum(value.numel() for value in outputs),
                )
            )
        return result


def _storage(tensor: Tensor) -> int:
    """What a tensor shares with its views."""
    return tensor.untyped_storage()._cdata  # noqa: SLF001 - tensors without data have no other identity


_FREE = {"_unsafe_view", "detach", "empty", "lift_fresh"}
_TORCH_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Product to the position of its left factor, whose last axis is what is summed over."""
_PRODUCT_LIKE = re.compile(r"conv|mm$|mv$|dot|attention|einsum|linear")


def _torch_macs(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    if name == "convolution":
        return outputs[0].numel() * math.prod(args[1].shape[1:])  # weight (O, C/groups, k, k)
    if name in _TORCH_PRODUCTS:
        return outputs[0].numel() * int(args[_TORCH_PRODUCTS[name]].shape[-1])
    if _PRODUCT_LIKE.search(name):
        raise ValueError(f"the network runs aten.{name}, whose multiply-adds nothing here counts")
    return 0


def count_graph(model: onnx.ModelProto) -> Counts:
    """What an ONNX graph does for one image, told from its shapes.

    Raises:
        ValueError: a shape cannot be inferred, or a product is not in the table.
    """
    parameters = sum(math.prod(t.dims) for t in model.graph.initializer if t.data_type in _PARAMETER_TYPES)
    statistics = {name for n in model.graph.node if n.op_type == "BatchNormalization" for name in n.input[3:5]}
    parameters -= sum(math.prod(t.dims) for t in model.graph.initializer if t.name in statistics)
    weights = {t.name: tuple(t.dims) for t in model.graph.initializer}
    shapes = _shapes(model) | weights
    for node in model.graph.node:
        for name in (*node.input, *node.output):
            if name and name not in shapes:
                raise ValueError(f"the shape of {name} ({node.op_type} {node.name}) cannot be inferred")
    stage = "input"
    operations = []
    for node in model.graph.node:  # in the order of the trace: what reads no weight belongs to what came before
        stages = [found for name in node.input if name in weights and (found := stage_of(name))]
        stage = stages[0] if stages else stage
        if node.op_type in _FREE_NODES:
            continue
        read = [name for name in node.input if name]
        operations.append(
            OpCount(
                op=node.op_type,
                stage=stage,
                macs=_node_macs(node, shapes),
                weight_elements=sum(math.prod(weights[name]) for name in read if name in weights),
                activation_elements=sum(math.prod(shapes[name]) for name in read if name not in weights)
                + sum(math.prod(shapes[name]) for name in node.output if name),
            )
        )
    ends = [v.name for v in (*model.graph.input, *model.graph.output) if v.name not in weights]
    return Counts.of(parameters, sum(math.prod(shapes[name]) for name in ends), operations)


_PARAMETER_TYPES = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.INT8,
    onnx.TensorProto.UINT8,
}
_FREE_NODES = {"Reshape", "Identity", "Flatten", "Squeeze", "Unsqueeze", "Constant", "Shape"}
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Convolution to the position of its weight."""
_PRODUCTS = {"MatMul", "MatMulInteger", "QLinearMatMul"}
_UNCOUNTED = {"Attention", "ConvTranspose", "Einsum", "GRU", "LSTM", "RNN"}


def _node_macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    if node.op_type in _CONVOLUTIONS:
        weight = shapes[node.input[_CONVOLUTIONS[node.op_type]]]  # (O, C/groups, k, k)
        return math.prod(shapes[node.output[0]]) * math.prod(weight[1:])
    if node.op_type in _PRODUCTS:
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]
    if node.op_type in _UNCOUNTED:
        raise ValueError(f"the graph has a {node.op_type}, whose multiply-adds nothing here counts")
    return 0


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Every value's shape at batch 1; weights are left out of what shape inference copies."""
    small = without_weights(model, large_weights(model), as_inputs=True)
    del small.graph.value_info[:]
    for value in small.graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
    for value in small.graph.output:
        value.type.tensor_type.ClearField("shape")
    fixed_batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    if fixed_batch > 1:
        raise ValueError(f"the graph is for batches of {fixed_batch} only; figures are for one image")
    inferred = onnx.shape_inference.infer_shapes(small, data_prop=True).graph
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.input, *inferred.output, *inferred.value_info)
        if all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    }
