"""Count what TensorRT-RTX makes of a graph, for three forms of FC3: `python tools/tensorrt_layers.py`.

No GPU is needed. The builder compiles ahead of time and logs the kernels of the engine, with their inputs and outputs.
From this log:

| count | what it is |
|---|---|
| kernels | launches of one inference |
| products | convolutions and matrix products, whatever else was fused into them |
| reformats | kernels that compute nothing: they only move, cast, slice or pad |
| fused | kernels that do the work of several operations of the graph |
| MB | bytes of activations that kernels read and write at batch 8: what goes through memory |

FC3 multiplies x, (S, N·C/S, h·w), by W, (S, h·w, h·w). The forms, all with the same products and weights:

- `matmul`: the batched product as it stands, the graph that is exported;
- `grouped`: a 1×1 convolution with S groups over (N·C/S, S·h·w, 1, 1), as upstream has it;
- `points`: the same convolution over (1, S·h·w, N·C/S, 1), whose positions are the rows.

Kernels are counted in an engine for batches 1 to 64, bytes in one for batch 8 alone, where every shape is known.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import tensorrt_rtx as trt
import torch
from onnx import NodeProto, helper, numpy_helper

from repmlp_deploy import load_card, merge_branches
from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.formats.tensorrt.flavours import creation_flags
from repmlp_deploy.convert.graph.export import export_graph, trace_network
from repmlp_deploy.convert.graph.lowering.lower import product_tensors, set_precision
from repmlp_deploy.convert.graph.proto import copy_graph, serialize_model
from repmlp_deploy.convert.graph.simplify import simplify_graph
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.nets.families import build_network

__all__ = ["FORMS", "Counts", "Kernel", "count_kernels", "read_kernels", "with_fc3"]

CARDS = ("repmlpnet-b224", "repmlpnet-t224", "repmlp-res50-light-224")
PRECISIONS = ("fp16", "int8")
FORMS = ("matmul", "grouped", "points")
BATCHES, BATCH = BatchRange(min=1, opt=8, max=64), BatchRange(min=8, opt=8, max=8)

_PRODUCT_KINDS = ("gemm", "correlation")
_PRODUCT_WORDS = ("Corr", "Fc", "Gemm", "MatM", "Conv")
_MOVING = {"Cast", "Conc", "Move", "Pad", "Repl", "Resh", "Slic", "Tran"}
_MATRIX_RANKS = (2, 3)
_SIZES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "FP8": 1, "Int32": 4, "Int64": 8, "Bool": 1}


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine.

    Attributes:
        name: as the builder calls it, `__myl_TranCastMean_myl0_3` or after the product.
        kind: `gemm`, `correlation`, `kgen`, `runtime_fusion`, ….
        moved: bytes of its inputs and outputs, without weights; 0 where a size is not known before a run.
    """

    name: str
    kind: str
    moved: int

    @property
    def steps(self) -> list[str]:
        """Return the operations that its name lists, four letters each; none of a kernel named after a product."""
        words = re.fullmatch(r"__myl_([A-Za-z0-9]+)_myl\d+_\d+", self.name)
        return re.findall(r"[A-Z][a-z0-9]*", words[1]) if words else []

    @property
    def is_product(self) -> bool:
        """Return whether it multiplies matrices."""
        return self.kind in _PRODUCT_KINDS or any(step in _PRODUCT_WORDS for step in self.steps)

    @property
    def only_moves(self) -> bool:
        """Return whether it computes nothing."""
        return bool(self.steps) and set(self.steps) <= _MOVING


@dataclass(frozen=True)
class Counts:
    """What the kernels of an engine come to; see the module's text."""

    kernels: int
    products: int
    reformats: int
    fused: int
    moved: int

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> Counts:
        """Count kernels."""
        return cls(
            len(kernels),
            sum(kernel.is_product for kernel in kernels),
            sum(kernel.only_moves for kernel in kernels),
            sum(len(kernel.steps) > 1 for kernel in kernels),
            sum(kernel.moved for kernel in kernels),
        )


def read_kernels(log: str) -> list[Kernel]:
    """Return the kernels that a detailed build log lists; those that only compute shapes are left out."""
    lines = re.findall(r"^Name: (\S+), LayerType: (\w+), (.*)$", log, re.MULTILINE)
    return [Kernel(name, kind, _moved(rest)) for name, kind, rest in lines if kind != "shape_call"]


def _moved(text: str) -> int:
    """Return the bytes of inputs and outputs; 0 if a dimension is open."""
    listed = re.search(r"Inputs: \[(.*?)\], Constants: \[.*?\], Outputs: \[(.*?)\], TacticName", text)
    total = 0
    for dims, kind in re.findall(
        r"Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)", " ".join(listed.groups()) if listed else ""
    ):
        sizes = [int(size) for size in dims.split(",") if size]
        if min(sizes, default=1) < 0:
            return 0
        total += int(np.prod(sizes, dtype=np.int64)) * _SIZES[kind]
    return total


def with_fc3(graph: onnx.ModelProto, form: str) -> onnx.ModelProto:
    """Return a copy of a float32 graph whose batched products by constants have another of `FORMS`."""
    made = copy_graph(graph)
    if form == "matmul":
        return made
    weights = {tensor.name: tensor for tensor in made.graph.initializer}
    products = [node for node in made.graph.node if _is_batched(node, weights)]
    nodes: list[NodeProto] = []
    for node in made.graph.node:
        if node in products:
            nodes += _as_convolution(node, weights[node.input[1]], form, made)
        else:
            nodes.append(node)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def _is_batched(node: NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    """Return whether a node is FC3: a product by a constant that is named after it."""
    if node.op_type != "MatMul" or node.input[1] not in weights:
        return False
    return node.input[1].endswith("fc3") and len(weights[node.input[1]].dims) in _MATRIX_RANKS


def _as_convolution(
    node: NodeProto, tensor: onnx.TensorProto, form: str, model: onnx.ModelProto
) -> Iterator[NodeProto]:
    """Yield the nodes that replace (S, n, K) × (S, K, R) by a convolution with S groups; without S where there is one.

    The weights are turned in place, (S, K, R) -> (S·R, K, 1, 1).
    """
    matrix = numpy_helper.to_array(tensor)
    alone = matrix.ndim == min(_MATRIX_RANKS)
    S, K, R = (1, *matrix.shape) if alone else matrix.shape  # noqa: N806 - the papers' letters
    turned = np.ascontiguousarray(matrix.reshape(S, K, R).transpose(0, 2, 1)).reshape(S * R, K, 1, 1)
    tensor.CopyFrom(numpy_helper.from_array(turned, tensor.name))
    value, result = node.input[0], node.output[0]

    def shape(name: str, *sizes: int) -> str:
        model.graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), f"{result}_{name}"))
        return f"{result}_{name}"

    def add(op: str, inputs: Sequence[str], name: str, **attributes: Any) -> NodeProto:
        made = helper.make_node(op, inputs, [name], name=f"{name}_{op}", **attributes)
        made.metadata_props.extend(node.metadata_props)
        return made

    names = [f"{result}_{step}" for step in ("turned", "map", "conv", "rows")]
    first, last = ((1, 0, 2), (1, 0, 2)) if form == "grouped" else ((0, 2, 1), (0, 2, 1))
    into = shape("into", *((-1, S * K, 1, 1) if form == "grouped" else (1, S * K, -1, 1)))
    back = shape("back", *((-1, S, R) if form == "grouped" else (S, R, -1)))
    if alone:  # (n, K) -> (n, K, 1, 1), or (1, K, n, 1)
        first, last, back = (1, 0), (1, 0), shape("alone", *((-1, R) if form == "grouped" else (R, -1)))
    if alone and form == "grouped":
        names[0] = value
    else:
        yield add("Transpose", [value], names[0], perm=first)
    yield add("Reshape", [names[0], into], names[1])
    conv = add("Conv", [names[1], node.input[1]], names[2], group=S, kernel_shape=(1, 1))
    conv.name = node.name
    yield conv
    if alone and form == "grouped":
        yield add("Reshape", [names[2], back], result)
        return
    yield add("Reshape", [names[2], back], names[3])
    yield add("Transpose", [names[3]], result, perm=last)


class _Logger(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:  # noqa: ARG002 - TensorRT's signature
        self.messages.append(msg)


def count_kernels(graph: bytes, batch: BatchRange, shape: tuple[int, int, int]) -> Counts:
    """Build an engine and count its kernels.

    Args:
        graph: serialized, with one input `images`.
        batch: sizes that the engine serves.
        shape: of the input without the batch, (C, H, W).
    """
    logger = _Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(creation_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        raise SystemExit(f"TensorRT-RTX cannot parse the graph: {parser.get_error(0).desc()}")
    network.get_input(0).shape = (batch.min if batch.min == batch.max else -1, *shape)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *((size, *shape) for size in (batch.min, batch.opt, batch.max)))
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        raise SystemExit(f"TensorRT-RTX cannot build the graph: {logger.messages[-1]}")
    return Counts.of(read_kernels("\n".join(logger.messages)))


def lowered(graph: onnx.ModelProto, precision: str) -> bytes:
    """Return a graph in a precision, serialized; ranges of int8 are made up, since kernels do not depend on them."""
    ranges = dict.fromkeys(product_tensors(graph), 4.0)
    return serialize_model(set_precision(graph, precision, ranges=ranges).model)


def folded_graph(name: str) -> tuple[onnx.ModelProto, tuple[int, int, int]]:
    """Return the exported graph of a card's network with random weights, and its input's shape."""
    card = load_card(name)
    torch.manual_seed(0)
    network = fold_affine(merge_branches(build_network(card).eval().requires_grad_(requires_grad=False)))
    shape = (3, *card.input_size)
    traced = trace_network(network, [torch.zeros(1, *shape)], BATCHES)
    return simplify_graph(export_graph(traced, input_names=["images"], output_names=["logits"])), shape


def rows(name: str) -> Iterator[str]:
    """Yield the lines of one network's table."""
    graph, shape = folded_graph(name)
    for precision in PRECISIONS:
        for form in FORMS:
            data = lowered(with_fc3(graph, form), precision)
            counts = count_kernels(data, BATCHES, shape)
            moved = count_kernels(data, BATCH, shape).moved
            cells = (counts.kernels, counts.products, counts.reformats, counts.fused, f"{moved / 1e6:.0f}")
            yield f"| {name} | {precision} | {form} | " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cards", nargs="*", default=CARDS)
    names = parser.parse_args().cards
    sys.stdout.write(f"TensorRT-RTX {trt.__version__}, for compute capability 8.9\n\n")
    sys.stdout.write("| network | precision | FC3 | kernels | products | reformats | fused | MB |\n")
    sys.stdout.write("|---|---|---|--:|--:|--:|--:|--:|\n")
    for line in (line for name in names for line in rows(name)):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
