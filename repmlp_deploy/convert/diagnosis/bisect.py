"""Bisecting an ONNX graph: the first value that is not what the traced network computes there.

The exporter writes on every node which modules it came from; weights keep their names. Both give the anchors, which are
read as further outputs of the graph. They are computed by ONNX Runtime, or by an engine that is built from the graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from repmlp_deploy.convert.diagnosis.blame import Blame
from repmlp_deploy.convert.diagnosis.places import place_of
from repmlp_deploy.convert.diagnosis.values import Anchor, Arrays, Trace, Values, first_difference
from repmlp_deploy.convert.graph.lowering.names import parameter_of
from repmlp_deploy.convert.graph.lowering.pointwise import channels_last_values, with_bias_added
from repmlp_deploy.convert.graph.nodes import modules_around
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.graph.run import said_by_runtime
from repmlp_deploy.errors import BuildError, DeviceError, MissingDependency, MissingDevice
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.onnx.runner import open_session
from repmlp_deploy.runtime.runner import RunnerOptions

__all__ = ["Compute", "GraphValues", "blame_graph", "compute_in_onnx_runtime"]

_PASSED_ON = ("Cast", "DequantizeLinear", "Identity")  # a weight after these is still the weight

Compute = Callable[[bytes, Arrays, Sequence[str]], list[NDArray[Any]]]
"""From a graph, its inputs and names of values, some of them further outputs of the graph, to these values."""


def compute_in_onnx_runtime(graph: bytes, inputs: Arrays, names: Sequence[str]) -> list[NDArray[Any]]:
    """Run a graph in ONNX Runtime on the CPU; return the outputs of these names."""
    session, _ = open_session(graph, RunnerOptions(device="cpu"))
    given = dict(zip((value.name for value in session.get_inputs()), inputs, strict=True))
    answer: list[NDArray[Any]] = session.run(list(names), given)
    return answer


def blame_graph(
    program: torch.export.ExportedProgram,
    data: bytes,
    batches: Sequence[Arrays],
    precision: str = "fp32",
) -> Blame | None:
    """Return the first place where an ONNX graph differs from the traced network; None if it does not.

    A weight that is not the trace's is found even where no value shows it.

    Args:
        program: the trace.
        data: the graph, exported from it; simplified or of lower precision as well.
        batches: inputs (n, …) of one or several batch sizes; where the trace takes only one, the graph is but run at
            the others.
        precision: of the graph; what it allows is applied to every value.
    """
    return first_difference(GraphValues(data, precision), program, batches)


class GraphValues(Values):
    """An ONNX graph with its anchors.

    Args:
        data: the graph, serialized.
        precision: of it.
        compute: what runs it.
    """

    def __init__(self, data: bytes, precision: str, compute: Compute = compute_in_onnx_runtime) -> None:
        self.precision = precision
        self.model = onnx.load_model_from_string(data)
        self.end = len(self.model.graph.node)
        self._compute = compute
        self._weights = {parameter_of(tensor.name): tensor for tensor in self.model.graph.initializer}
        self._outputs = [value.name for value in self.model.graph.output]
        self._read: dict[int, list[str]] = {}
        quantized = PRECISIONS[precision].lowering == "quantize"
        self._channels_last = channels_last_values(self.model.graph) if quantized else set()
        self._anchors = self._find_anchors()

    def _find_anchors(self) -> list[Anchor]:
        """Return the last value of every module and the value of every node that reads a weight, in order."""
        passed = {tensor.name: parameter_of(tensor.name) for tensor in self.model.graph.initializer}
        found: dict[str, Anchor] = {}
        biased = with_bias_added(self.model.graph)
        for i, node in enumerate(self.model.graph.node):
            weights = [passed[name] for name in node.input if name in passed]
            if node.op_type in _PASSED_ON and weights:
                passed[node.output[0]] = weights[0]
                continue
            self._read[i] = weights
            for weight in weights:
                found.setdefault(weight, Anchor(weight, biased.get(node.output[0], node).output[0], i))
            for module in modules_around(node):
                found[module] = Anchor(module, node.output[0], i)
        return sorted(found.values(), key=lambda anchor: anchor.index)

    def anchors(self, trace: Trace) -> Sequence[Anchor]:
        """Return the anchors that the graph's own notes give."""
        del trace
        return self._anchors

    def values(self, inputs: Arrays, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Compute the values of `names`, which need not be outputs."""
        further = [name for name in dict.fromkeys(names) if name not in self._outputs]
        outputs = self.model.graph.output
        outputs.extend(onnx.ValueInfoProto(name=name) for name in further)
        try:
            data = serialize_model(self.model)
        finally:
            del outputs[len(self._outputs) :]
        answer = self._compute(data, inputs, names)
        return {
            name: value.transpose(0, 3, 1, 2) if name in self._channels_last else value
            for name, value in zip(names, answer, strict=True)
        }

    def failure(self, inputs: Arrays) -> Blame | None:
        """Return the node at which the runtime fails, if it does."""
        try:
            self.values(inputs, self._outputs)
        except (BuildError, DeviceError, MissingDependency, MissingDevice):  # nothing is known of the graph
            raise
        except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base
            named = re.search(r"(?:Name:'|Node \()([^')]*)['\)]", str(error))
            node = next((n for n in self.model.graph.node if named and n.name == named[1]), None)
            block, part = ("input", "") if node is None else place_of(_module_of(node))
            kind = "" if node is None else f"{node.op_type} {node.name} "
            return Blame(block, part, f"{kind}fails at batch {len(inputs[0])}: {said_by_runtime(error)}")
        return None

    def weights_read(self, index: int) -> Sequence[str]:
        """Return the names of the weights that a node reads."""
        return self._read.get(index, ())

    def stored(self, weight: str) -> NDArray[Any] | None:
        """Return a weight of the graph."""
        tensor = self._weights.get(weight)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def operation(self, anchor: Anchor) -> tuple[str, str]:
        """Return the module of an anchor's node, and its operator and name."""
        node = self.model.graph.node[anchor.index]
        return _module_of(node), f"{node.op_type} {node.name}"


def _module_of(node: onnx.NodeProto) -> str:
    scopes = modules_around(node)
    return scopes[-1] if scopes else ""
