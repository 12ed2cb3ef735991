"""Bisecting: the first value of an ONNX graph that is not what the traced network computes there.

The exporter writes on every node which modules it came from; weights keep their names. Both give *anchors*, values that
graph and trace have in common: the output of the last node of a module, and of the node that reads a weight.
The trace is run in float64 for what they should be and in float32 for their noise floors, the graph with the anchors as
further outputs: first those at the ends of blocks, then those inside the first block that differs.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from repmlp_deploy.convert.diagnosis.blame import Blame, place_of
from repmlp_deploy.convert.graph.lowering.pointwise import channels_last_values, with_bias_added
from repmlp_deploy.convert.graph.nodes import modules_around
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.convert.graph.run import said_by_runtime
from repmlp_deploy.errors import MissingDevice, VerificationError
from repmlp_deploy.nets.blocks.checks import Check, Element
from repmlp_deploy.numerics import compare, is_close, noise_floor
from repmlp_deploy.precision import PRECISIONS
from repmlp_deploy.runtime.onnx.runner import open_session
from repmlp_deploy.runtime.runner import RunnerOptions

__all__ = ["blame_graph"]

_PASSED_ON = ("Cast", "DequantizeLinear", "Identity")  # a weight after these is still the weight
_TYPES = "|".join(entry.onnx_type.lower() for entry in PRECISIONS.values())
_SUFFIXES = re.compile(f"_({_TYPES})$")  # of weights in a lower precision
_AT_ONCE = 48  # further outputs of one run

Arrays = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class _Anchor:
    """A value of the graph and where it comes from.

    Attributes:
        key: a module, or a weight that the value's node reads.
        value: its name in the graph.
        index: of its node.
    """

    key: str
    value: str
    index: int

    @property
    def ends_a_block(self) -> bool:
        block, part = place_of(self.key)
        return bool(block) and not part


def blame_graph(
    program: torch.export.ExportedProgram, data: bytes, batches: Sequence[Arrays], precision: str = "fp32"
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
    graph = _Graph(data, precision)
    trace = _Trace(program)
    for inputs in batches:
        failed = graph.failure(inputs)
        if failed is not None:
            return failed
        found = _first_straying(graph, trace, inputs) if trace.takes(inputs) else None
        if found is not None:
            return graph.blame(found, trace)
    return graph.wrong_weight(trace, len(graph.model.graph.node))


@dataclass(frozen=True)
class _Straying:
    """An anchor that differs: its largest error, None where it cannot be told, its noise floor, and what was said."""

    anchor: _Anchor
    error: float | None
    floor: float | None
    fault: str = ""


def _first_straying(graph: _Graph, trace: _Trace, inputs: Arrays) -> _Straying | None:
    """Return the first anchor that differs: the first block whose end differs, then the first inside it."""
    anchors = [anchor for anchor in graph.anchors if anchor.key in trace.nodes]
    ends = [anchor for anchor in anchors if anchor.ends_a_block]
    found = _first_of(ends, graph, trace, inputs)
    last = len(graph.model.graph.node) if found is None else found.anchor.index
    before = max((anchor.index for anchor in ends if anchor.index < last), default=-1)
    inside = [anchor for anchor in anchors if before < anchor.index <= last]
    return _first_of(inside, graph, trace, inputs) or found


def _first_of(anchors: Sequence[_Anchor], graph: _Graph, trace: _Trace, inputs: Arrays) -> _Straying | None:
    """Return the first of `anchors` that differs; ask for a bounded number of further outputs at a time."""
    for start in range(0, len(anchors), _AT_ONCE):
        part = anchors[start : start + _AT_ONCE]
        got = graph.values(inputs, [anchor.value for anchor in part])
        expected, single = trace.values(inputs, [anchor.key for anchor in part])
        for anchor in part:
            y, reference = got[anchor.value], expected[anchor.key]
            if y.ndim != reference.ndim or not np.issubdtype(y.dtype, np.floating):
                continue  # the exporter computes this value in another form
            floor = None
            try:
                floor = noise_floor(single[anchor.key], reference)
                result = compare(y, reference, classes=False)
            except VerificationError as failure:
                return _Straying(anchor, None, floor, str(failure).removeprefix("output "))
            if not is_close(result, floor=floor, precision=graph.precision):
                return _Straying(anchor, result.max_abs, floor)
    return None


class _Trace:
    """A traced network, and its values under module and weight names."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._single = program.module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own trees
            self._double = copy.deepcopy(self._single).double()
        self.weights: Mapping[str, Tensor] = program.state_dict
        self.nodes: dict[str, str] = {}
        if any("batch_norm" in str(node.target) for node in self._single.graph.nodes):
            self.weights = {}  # simplification puts BatchNorms into them
        for node in self._single.graph.nodes:
            if node.op == "get_attr" and len(node.users) == 1 and str(node.target) in self.weights:
                self.nodes[str(node.target)] = next(iter(node.users)).name
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                for module, _ in node.meta.get("nn_module_stack", {}).values():
                    self.nodes[module] = node.name  # the last one stays

    def takes(self, inputs: Arrays) -> bool:
        """Return whether a batch is one that was traced."""
        first = next(node for node in self._single.graph.nodes if node.op == "placeholder")
        n = first.meta["val"].shape[0]
        return not isinstance(n, int) or n == len(inputs[0])

    def values(self, inputs: Arrays, keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compute the values of `keys` in float64 and in float32."""
        return self._run(self._double, inputs, keys, torch.float64), self._run(self._single, inputs, keys, None)

    @torch.no_grad()
    def _run(
        self, module: nn.Module, inputs: Arrays, keys: Sequence[str], dtype: torch.dtype | None
    ) -> dict[str, NDArray[Any]]:
        kept = _Keeping(module, {self.nodes[key] for key in keys})
        tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs]
        kept.run(*(x.to(dtype) if dtype is not None and x.is_floating_point() else x for x in tensors))
        return {key: kept.values[self.nodes[key]] for key in keys}


class _Keeping(torch.fx.Interpreter):
    """Runs a trace and keeps the values of some nodes."""

    def __init__(self, module: nn.Module, names: set[str]) -> None:
        super().__init__(module)
        self._names = names
        self.values: dict[str, NDArray[Any]] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self.values[n.name] = value.detach().numpy()
        return value


class _Graph:
    """An ONNX graph with its anchors."""

    def __init__(self, data: bytes, precision: str) -> None:
        self.precision = precision
        self.model = onnx.load_model_from_string(data)
        self._inputs = [value.name for value in self.model.graph.input]
        self._weights = {_SUFFIXES.sub("", tensor.name): tensor for tensor in self.model.graph.initializer}
        self._outputs = [value.name for value in self.model.graph.output]
        self._read: dict[int, list[str]] = {}
        quantized = PRECISIONS[precision].lowering == "quantize"
        self._channels_last = channels_last_values(self.model.graph) if quantized else set()
        self.anchors = self._find_anchors()

    def _find_anchors(self) -> list[_Anchor]:
        """Return the last value of every module and the value of every node that reads a weight, in order."""
        passed = {tensor.name: _SUFFIXES.sub("", tensor.name) for tensor in self.model.graph.initializer}
        found: dict[str, _Anchor] = {}
        biased = with_bias_added(self.model.graph)
        for i, node in enumerate(self.model.graph.node):
            weights = [passed[name] for name in node.input if name in passed]
            if node.op_type in _PASSED_ON and weights:
                passed[node.output[0]] = weights[0]
                continue
            self._read[i] = weights
            for weight in weights:
                found.setdefault(weight, _Anchor(weight, biased.get(node.output[0], node).output[0], i))
            for module in modules_around(node):
                found[module] = _Anchor(module, node.output[0], i)
        return sorted(found.values(), key=lambda anchor: anchor.index)

    def values(self, inputs: Arrays, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Compute the values of `names`, which need not be outputs."""
        further = [name for name in dict.fromkeys(names) if name not in self._outputs]
        outputs = self.model.graph.output
        outputs.extend(onnx.ValueInfoProto(name=name) for name in further)
        try:
            session, _ = open_session(serialize_model(self.model), RunnerOptions(device="cpu"))
        finally:
            del outputs[len(self._outputs) :]
        given = dict(zip(self._inputs, inputs, strict=True))
        answer: list[NDArray[Any]] = session.run(list(names), given)
        return {
            name: value.transpose(0, 3, 1, 2) if name in self._channels_last else value
            for name, value in zip(names, answer, strict=True)
        }

    def failure(self, inputs: Arrays) -> Blame | None:
        """Return the node at which ONNX Runtime fails, if it does."""
        try:
            self.values(inputs, self._outputs)
        except MissingDevice:
            raise
        except Exception as error:  # noqa: BLE001 - onnxruntime's exceptions share no public base
            named = re.search(r"(?:Name:'|Node \()([^')]*)['\)]", str(error))
            node = next((n for n in self.model.graph.node if named and n.name == named[1]), None)
            block, part = ("input", "") if node is None else place_of(self._module_of(node))
            kind = "" if node is None else f"{node.op_type} {node.name} "
            return Blame(block, part, f"{kind}fails at batch {len(inputs[0])}: {said_by_runtime(error)}")
        return None

    def _module_of(self, node: onnx.NodeProto) -> str:
        scopes = modules_around(node)
        return scopes[-1] if scopes else ""

    def blame(self, found: _Straying, trace: _Trace) -> Blame:
        """Return the blame for an anchor: the first wrong weight read up to there, or the node itself."""
        weight = self.wrong_weight(trace, found.anchor.index + 1)
        if weight is not None:
            return replace(weight, fault=found.fault or weight.fault, error=found.error, floor=found.floor)
        node = self.model.graph.node[found.anchor.index]
        place = found.anchor.key if found.anchor.key in self._weights else self._module_of(node) or found.anchor.key
        what = "computes something else" if self.precision == "fp32" else f"cannot do with {self.precision}"
        fault = found.fault or f"{node.op_type} {node.name} {what}"
        return Blame(*_place(place), fault, found.error, found.floor)

    def wrong_weight(self, trace: _Trace, end: int) -> Blame | None:
        """Return the first wrong weight among those that nodes before `end` read."""
        for i in range(end):
            for name in self._read.get(i, ()):
                element = self._wrong_element(name, trace)
                if element is not None:
                    return Blame(*_place(name), "the graph holds another weight", element=element)
        return None

    def _wrong_element(self, name: str, trace: _Trace) -> Element | None:
        """Return the worst entry of a wrong weight."""
        rounding = PRECISIONS[self.precision].rounding
        tensor, expected = self._weights.get(name), trace.weights.get(name)
        if tensor is None or expected is None or rounding is None:
            return None
        got = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        if got.shape != expected.shape or not got.is_floating_point():
            return None
        found = Check("", name, got, expected.detach().double(), eps=2 * rounding).finding()
        return None if found is None else found.element


def _place(key: str) -> tuple[str, str]:
    """Return block and part of a module or a weight."""
    return place_of(re.sub(r"\.(weight|bias)$", "", key))
