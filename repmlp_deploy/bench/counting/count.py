"""Counting: parameters, multiply-adds and memory traffic of a network or an ONNX graph, from shapes alone.

The conventions are those of `counts`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repmlp_deploy.bench.counting.counts import Counts, OpCount, stage_of
from repmlp_deploy.convert.graph.proto import large_weights, without_weights

__all__ = ["count_graph", "count_network"]


def count_network(network: nn.Module, shape: Sequence[int]) -> Counts:
    """Count what a PyTorch network does for one image, from a run without data.

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


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps an `OpCount` of every operation that runs inside."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {_storage(weight) for weight in weights}
        self._stage = "input"
        self.operations: list[OpCount] = []

    def entering(self, stage: str) -> Any:
        """Return a hook that notes the stage of the operations that follow."""

        def hook(_module: nn.Module, _arguments: Any) -> None:
            self._stage = stage

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
    """Return what a tensor shares with its views."""
    identity: int = tensor.untyped_storage()._cdata  # noqa: SLF001 - tensors without data have no other identity
    return identity


_FREE = {"_unsafe_view", "detach", "empty", "lift_fresh"}
_TORCH_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Product to the position of its left factor, whose last axis is what is summed over."""
_PRODUCT_LIKE = re.compile(r"conv|mm$|mv$|dot|attention|einsum|linear")


def _torch_macs(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> int:
    if name == "convolution":
        return outputs[0].numel() * int(math.prod(args[1].shape[1:]))  # weight (O, C/groups, k, k)
    if name in _TORCH_PRODUCTS:
        return outputs[0].numel() * int(args[_TORCH_PRODUCTS[name]].shape[-1])
    if _PRODUCT_LIKE.search(name):
        raise ValueError(f"the network runs aten.{name}, whose multiply-adds nothing here counts")
    return 0


def count_graph(model: onnx.ModelProto) -> Counts:
    """Count what an ONNX graph does for one image, from its shapes.

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
        if all(name in weights for name in node.input if name):  # a runtime computes it once, when it loads
            weights |= {name: shapes[name] for name in node.output}
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
    """Return every value's shape at batch 1; weights are left out of what shape inference copies."""
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
