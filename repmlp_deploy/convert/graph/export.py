"""From a torch module to an ONNX graph: symbolic batch, fixed H and W, metadata embedded.

Reasoning about a symbolic batch costs torch more than everything else together. A network whose code never names the
batch, every reshape leaving it to −1, gives the same nodes when it is traced with a fixed one; only the graph's borders
say it then, and `with_symbolic_batch` makes them say otherwise. Whether that was so, running the graph at other batch
sizes tells; where it was not, the network is traced again as it should be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.capture import captured_output
from repmlp_deploy.convert.graph.nodes import name_by_module
from repmlp_deploy.convert.graph.proto import SCOPES, copy_graph
from repmlp_deploy.convert.options import DEFAULT_OPSET
from repmlp_deploy.errors import InputError, MissingDependency, RepMLPError
from repmlp_deploy.nets.flat import Flat, failing_module
from repmlp_deploy.text import first_line, kind_and_line

try:
    import onnx
    import onnx_ir
    import onnxscript  # noqa: F401 - torch.onnx.export needs it, and says so only in passing
    from onnx import helper
except ImportError as error:
    raise MissingDependency(error.name or "onnx", "export") from None

__all__ = ["TRACED", "Traced", "export_graph", "trace_network", "with_metadata", "with_symbolic_batch"]

BATCH_AXIS = "batch"

_TALKATIVE = ("torch", "onnxscript", "onnx_ir")
_OPERATOR = re.compile(r"target=torch\.ops\.([\w.]+)")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_BULKY = ("conv1d", "conv3d", "conv_transpose")  # without a bias, they become a dozen nodes for it
_SEQUENCES = ("chunk", "split", "unbind", "unsafe_chunk", "unsafe_split")  # which TensorRT does not take
_TRACED_BATCH = 2  # 0 and 1 would be specialised
TRACED = BatchRange(min=_TRACED_BATCH, opt=_TRACED_BATCH, max=_TRACED_BATCH)
"""The fixed batch to trace with where the batch is to be made symbolic afterwards."""


@dataclass(frozen=True)
class Traced:
    """A torch.export program and what the exporter said while making it.

    Attributes:
        program: the program.
        chatter: captured output, for --debug.
    """

    program: torch.export.ExportedProgram
    chatter: str

    @property
    def needs_folding(self) -> bool:
        """Whether the exporter must fold: a BatchNorm, parts of a tensor, or a convolution other than conv2d."""
        kinds = {str(node.target).removeprefix("aten.") for node in self.program.graph.nodes}
        return any("batch_norm" in kind or kind.startswith(_BULKY + _SEQUENCES) for kind in kinds)


def trace_network(network: nn.Module, examples: Sequence[Tensor], batch: BatchRange) -> Traced:
    """Trace a network with torch.export; the network is called by position.

    Args:
        network: in evaluation mode.
        examples: a tensor (n, …) for every input.
        batch: sizes to serve; N is symbolic unless there is only one.

    Raises:
        InputError: the network's own code cannot be traced; the message is torch's first line.
    """
    fixed = batch.min == batch.max
    n = batch.min if fixed else max(batch.min, _TRACED_BATCH)
    inputs = tuple(example[:1].expand(n, *example.shape[1:]).contiguous() for example in examples)
    dynamic: tuple[Any, ...] | None = None
    if not fixed:
        dynamic = ({0: torch.export.Dim("batch", min=batch.min, max=batch.max)},) * len(inputs)
        dynamic = (dynamic,) if isinstance(network, Flat) else dynamic
    with captured_output(*_TALKATIVE) as chatter:
        try:
            program = torch.export.export(network, inputs, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            said = first_line(error)
            hint = "" if fixed else "; a fixed batch, --batch N, may help"
            place = failing_module(
                network, lambda: torch.export.export(network, inputs, dynamic_shapes=dynamic, strict=False)
            )
            raise InputError(f"torch.export cannot trace {place}: {said}{hint}; run again with --debug") from error
    return Traced(program, chatter.getvalue())


def export_graph(
    traced: Traced,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    optimize: bool = True,
    opset: int = DEFAULT_OPSET,
) -> onnx.ModelProto:
    """Export a traced network to an ONNX graph.

    Args:
        traced: the network.
        input_names: of the graph's inputs.
        output_names: of the graph's outputs.
        optimize: let the exporter fold constants and shapes, which takes a second; a network traced with a fixed batch
            has no shapes to compute, and the simplifier comes to the same graph without. It also moves BatchNorms into
            convolutions, which the simplifier does not.
        opset: of the graph; before 20, GELU is made of other operators.

    Raises:
        InputError: the exporter cannot convert a node; the message has the operator and the first cause.
        RepMLPError: it fails in another way, or gives no graph, or one of another opset.
    """
    with captured_output(*_TALKATIVE) as chatter:
        try:
            exported = torch.onnx.export(
                traced.program,
                dynamo=True,
                opset_version=opset,
                input_names=list(input_names),
                output_names=list(output_names),
                external_data=False,
                verbose=False,
                optimize=optimize,
            )
        except Exception as error:
            raise _failure(error) from error
    if exported is None:
        raise RepMLPError(f"torch.onnx.export returned nothing: {chatter.getvalue()[-200:]}")
    _part_outputs(exported.model.graph, input_names, output_names)
    graph = exported.model_proto
    if (given := graph.opset_import[0].version) != opset:
        raise RepMLPError(f"torch.onnx.export wrote opset {given} where {opset} was asked for")
    _drop_notes(graph)
    _name_batch(graph)
    name_by_module(graph)
    graph.ir_version = helper.find_min_ir_version_for(graph.opset_import)
    return graph


def _part_outputs(graph: onnx_ir.Graph, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Give a value of its own to every output that is an input or another output: a value has only one name."""
    seen = list(graph.inputs)
    for i, value in enumerate(list(graph.outputs)):
        if any(value is other for other in seen):
            copied = onnx_ir.node("Identity", [value])
            copied.outputs[0].type, copied.outputs[0].shape = value.type, value.shape
            graph.append(copied)
            graph.outputs[i] = copied.outputs[0]
        seen.append(value)
    for values, names in ((graph.inputs, input_names), (graph.outputs, output_names)):
        for value, name in zip(values, names, strict=True):
            value.name = name


def _failure(error: BaseException) -> RepMLPError:
    """Return what to raise for the exporter's error, with its innermost cause: its own first line speaks of steps."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    operator = next((found.group(1) for one in chain if (found := _OPERATOR.search(str(one)))), None)
    said = _COLOUR.sub("", kind_and_line(chain[-1]))
    if operator is None or isinstance(chain[-1], MemoryError | OSError):  # the machine's fault, or the exporter's
        return RepMLPError(f"torch.onnx.export failed: {said}; run again with --debug")
    return InputError(f"torch.onnx.export cannot convert {operator}: {said}; rewrite it, or run again with --debug")


def _name_batch(graph: onnx.ModelProto) -> None:
    """Call a symbolic batch `batch`, wherever a shape names it; the exporter calls it after a variable of its own."""
    symbol = next((v.type.tensor_type.shape.dim[0].dim_param for v in graph.graph.input), "")
    if not symbol or symbol == BATCH_AXIS:
        return
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # may be an expression, such as 4*s77
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", BATCH_AXIS, dim.dim_param)


def _drop_notes(graph: onnx.ModelProto) -> None:
    """Delete the exporter's notes from values and nodes, such as paths of this machine; keep the scopes."""
    for node in graph.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del value.metadata_props[:]
    del graph.graph.metadata_props[:]


def with_symbolic_batch(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return `graph` with a symbolic batch at its borders; a copy unless it has one."""
    if graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        return graph
    result = copy_graph(graph)
    for value in (*result.graph.input, *result.graph.output):
        batch = value.type.tensor_type.shape.dim[0]
        batch.ClearField("dim_value")
        batch.dim_param = BATCH_AXIS
    del result.graph.value_info[:]  # inner shapes would still name the traced batch
    return result


def with_metadata(graph: onnx.ModelProto, metadata: Mapping[str, object]) -> onnx.ModelProto:
    """Return a copy of `graph` with `metadata` as its only properties; values that are no strings become JSON."""
    result = copy_graph(graph)
    del result.metadata_props[:]
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        result.metadata_props.add(key=key, value=text)
    result.producer_name = "repmlp-deploy"
    return result
