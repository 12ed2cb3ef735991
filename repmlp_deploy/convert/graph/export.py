"""From a torch module to an ONNX graph: symbolic batch, fixed H and W, metadata embedded.

Reasoning about a symbolic batch costs torch more than everything else together. A network whose code never names the
batch, every reshape leaving it to −1, gives the same nodes when it is traced with a fixed one; only the graph's borders
say it then, and `with_symbolic_batch` makes them say otherwise. Whether that was so, running the graph at other batch
sizes tells; where it was not, the network is traced again as it should be.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repmlp_deploy.bundle import BatchRange
from repmlp_deploy.convert.graph.proto import SCOPES
from repmlp_deploy.errors import InputError, MissingDependency, RepMLPError
from repmlp_deploy.nets.flat import Flat

try:
    import onnx
    import onnxscript  # noqa: F401 - torch.onnx.export needs it, and says so only in passing
except ImportError as error:
    raise MissingDependency(error.name or "onnx", "export") from None

__all__ = ["OPSET", "TRACED", "Traced", "export_graph", "trace_network", "with_metadata", "with_symbolic_batch"]

OPSET = 20  # the first with Gelu

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


def trace_network(network: nn.Module, examples: Sequence[Tensor], batch: BatchRange) -> Traced:
    """The torch.export program of a network called by position.

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
    with _captured() as chatter:
        try:
            program = torch.export.export(network, inputs, dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            hint = "" if fixed else "; a fixed batch, --batch N, may help"
            raise InputError(f"torch.export cannot trace the network: {said}{hint}; run again with --debug") from error
    return Traced(program, chatter.getvalue())


def export_graph(
    traced: Traced, *, input_names: Sequence[str], output_names: Sequence[str], optimize: bool = True
) -> onnx.ModelProto:
    """The ONNX graph of a traced network.

    Args:
        traced: the network.
        input_names: of the graph's inputs.
        output_names: of the graph's outputs.
        optimize: let the exporter fold constants and shapes, which takes a second; a network traced with a fixed batch
            has no shapes to compute, and the simplifier comes to the same graph without.

    Raises:
        RepMLPError: the exporter failed; the message is its own first line.
    """
    with _captured() as chatter:
        try:
            exported = torch.onnx.export(
                traced.program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(input_names),
                output_names=list(output_names),
                external_data=False,
                verbose=False,
                optimize=optimize,
            )
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            raise RepMLPError(f"torch.onnx.export failed: {said}; run again with --debug") from error
    if exported is None:
        raise RepMLPError(f"torch.onnx.export returned nothing: {chatter.getvalue()[-200:]}")
    graph = exported.model_proto
    if (given := graph.opset_import[0].version) != OPSET:
        raise RepMLPError(f"torch.onnx.export wrote opset {given} where {OPSET} was asked for")
    return _without_notes(graph)


def _without_notes(graph: onnx.ModelProto) -> onnx.ModelProto:
    """`graph` without what the exporter notes on values and nodes, such as paths of this machine, but for modules."""
    for node in graph.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del value.metadata_props[:]
    del graph.graph.metadata_props[:]
    return graph


def with_symbolic_batch(graph: onnx.ModelProto) -> onnx.ModelProto:
    """`graph` with a symbolic batch at its borders, whatever it was traced with; the weights are not copied."""
    if graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        return graph
    for value in (*graph.graph.input, *graph.graph.output):
        batch = value.type.tensor_type.shape.dim[0]
        batch.ClearField("dim_value")
        batch.dim_param = "batch"
    del graph.graph.value_info[:]  # shapes inside that say the batch
    return graph


def with_metadata(graph: onnx.ModelProto, metadata: Mapping[str, object]) -> onnx.ModelProto:
    """`graph` with `metadata` as its own properties, values that are no strings as JSON; the weights are not copied."""
    del graph.metadata_props[:]
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        graph.metadata_props.add(key=key, value=text)
    graph.producer_name = "repmlp-deploy"
    return graph


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    """Everything that Python code prints, warns or logs inside, kept from the terminal."""
    text = io.StringIO()
    names = [
        None,
        *(n for n in logging.root.manager.loggerDict if n.split(".")[0] in ("torch", "onnxscript", "onnx_ir")),
    ]
    loggers = [logger for logger in map(logging.getLogger, names) if logger.handlers or logger is logging.root]
    before = [logger.handlers for logger in loggers]
    for logger in loggers:
        logger.handlers = [logging.StreamHandler(text)]
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield text
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers = handlers
