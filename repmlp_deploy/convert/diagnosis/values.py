"""Values of an artifact beside those of the traced network it was made from: the first that differs.

Both sides name *anchors*, values that they have in common: the output of the last operation of a module, and of the
operation that reads a weight. The trace is run in float64 for what they should be and in float32 for their noise
floors; the artifact with the anchors as further outputs: first those at the ends of blocks, then those inside the first
block that differs. How an artifact names and computes its values is the business of its `Values`.
"""

from __future__ import annotations

import copy
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repmlp_deploy.convert.diagnosis.blame import Blame
from repmlp_deploy.convert.diagnosis.places import place_of
from repmlp_deploy.errors import VerificationError
from repmlp_deploy.nets.blocks.checks import Check, Element
from repmlp_deploy.numerics import compare, is_close, noise_floor
from repmlp_deploy.precision import PRECISIONS

__all__ = ["Anchor", "Arrays", "Trace", "Values", "first_difference"]

_AT_ONCE = 48  # further outputs of one run

Arrays = Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Anchor:
    """A value of the artifact and where it comes from.

    Attributes:
        key: a module, or a weight that the value's operation reads.
        value: its name in the artifact.
        index: of its operation, in the order of execution.
    """

    key: str
    value: str
    index: int

    @property
    def ends_a_block(self) -> bool:
        block, part = place_of(self.key)
        return bool(block) and not part


@dataclass(frozen=True)
class Straying:
    """An anchor that differs: its largest error, None where it cannot be told, its noise floor, and what was said."""

    anchor: Anchor
    error: float | None
    floor: float | None
    fault: str = ""


class Values(ABC):
    """An artifact whose values can be read.

    Attributes:
        precision: of the artifact; what it allows is applied to every value.
        end: how many operations it has.
    """

    precision: str
    end: int

    @abstractmethod
    def anchors(self, trace: Trace) -> Sequence[Anchor]:
        """Return the values that can be compared with a trace, in the order of execution."""

    @abstractmethod
    def values(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """Compute the values of `names`, which need not be outputs."""

    @abstractmethod
    def failure(self, inputs: Arrays) -> Blame | None:
        """Return where the artifact fails to run, if it does."""

    @abstractmethod
    def weights_read(self, index: int) -> Sequence[str]:
        """Return the names of the weights that an operation reads."""

    @abstractmethod
    def stored(self, weight: str) -> NDArray[Any] | None:
        """Return a weight as the artifact stores it; None if it stores none of this name in a floating type."""

    @abstractmethod
    def operation(self, anchor: Anchor) -> tuple[str, str]:
        """Return the module and the name of an anchor's operation; the module is empty where none is known."""

    def blame(self, found: Straying, trace: Trace) -> Blame:
        """Return the blame for an anchor: the first wrong weight read up to there, or the operation itself."""
        weight = self.wrong_weight(trace, found.anchor.index + 1)
        if weight is not None:
            return replace(weight, fault=found.fault or weight.fault, error=found.error, floor=found.floor)
        module, operation = self.operation(found.anchor)
        place = found.anchor.key if found.anchor.key in trace.weights else module or found.anchor.key
        what = "computes something else" if self.precision == "fp32" else f"cannot do with {self.precision}"
        return Blame(*_place(place), found.fault or f"{operation} {what}", found.error, found.floor)

    def wrong_weight(self, trace: Trace, end: int) -> Blame | None:
        """Return the first wrong weight among those that operations before `end` read."""
        for i in range(end):
            for name in self.weights_read(i):
                element = self._wrong_element(name, trace)
                if element is not None:
                    return Blame(*_place(name), "the graph holds another weight", element=element)
        return None

    def _wrong_element(self, name: str, trace: Trace) -> Element | None:
        """Return the worst entry of a wrong weight."""
        rounding = PRECISIONS[self.precision].rounding
        expected = trace.weights.get(name)
        stored = None if expected is None or rounding is None else self.stored(name)
        if expected is None or rounding is None or stored is None:
            return None
        got = torch.from_numpy(stored.copy())
        if _edges(got.shape) == _edges(expected.shape):
            got = got.reshape(expected.shape)  # a 1×1 convolution may be stored as a matrix
        if got.shape != expected.shape or not got.is_floating_point():
            return None
        found = Check("", name, got, expected.detach().double(), eps=2 * rounding).finding()
        return None if found is None else found.element


class Trace:
    """A traced network, and its values under module and weight names.

    Attributes:
        weights: name to value; none where the network still has BatchNorms, which simplification puts into weights.
        nodes: module or weight to the node of the trace that gives its value.
        outputs: the nodes that give the outputs, in order.
        normalised: the nodes that only a BatchNorm reads; in an artifact, it may be part of the operation before it.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._single = program.module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own trees
            self._double = copy.deepcopy(self._single).double()
        self.weights: Mapping[str, Tensor] = program.state_dict
        self.nodes: dict[str, str] = {}
        norms = [node for node in self._single.graph.nodes if "batch_norm" in str(node.target)]
        read = [norm.all_input_nodes[0] for norm in norms]
        self.normalised = {node.name for node in read if len(node.users) == 1}
        if norms:
            self.weights = {}
        returned = next(node for node in self._single.graph.nodes if node.op == "output").all_input_nodes
        self.outputs = [node.name for node in returned]
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


def first_difference(
    artifact: Values, program: torch.export.ExportedProgram, batches: Sequence[Arrays]
) -> Blame | None:
    """Return the first place where an artifact differs from the traced network; None if it does not.

    A weight that is not the trace's is found even where no value shows it.

    Args:
        artifact: made from the trace.
        program: the trace.
        batches: inputs (n, …) of one or several batch sizes; where the trace takes only one, the artifact is but run at
            the others.
    """
    trace = Trace(program)
    for inputs in batches:
        failed = artifact.failure(inputs)
        if failed is not None:
            return failed
        found = _first_straying(artifact, trace, inputs) if trace.takes(inputs) else None
        if found is not None:
            return artifact.blame(found, trace)
    return artifact.wrong_weight(trace, artifact.end)


def _first_straying(artifact: Values, trace: Trace, inputs: Arrays) -> Straying | None:
    """Return the first anchor that differs: the first block whose end differs, then the first inside it."""
    anchors = [anchor for anchor in artifact.anchors(trace) if anchor.key in trace.nodes]
    ends = [anchor for anchor in anchors if anchor.ends_a_block]
    found = _first_of(ends, artifact, trace, inputs)
    last = artifact.end if found is None else found.anchor.index
    before = max((anchor.index for anchor in ends if anchor.index < last), default=-1)
    inside = [anchor for anchor in anchors if before < anchor.index <= last]
    return _first_of(inside, artifact, trace, inputs) or found


def _first_of(anchors: Sequence[Anchor], artifact: Values, trace: Trace, inputs: Arrays) -> Straying | None:
    """Return the first of `anchors` that differs; ask for a bounded number of further outputs at a time."""
    for start in range(0, len(anchors), _AT_ONCE):
        part = anchors[start : start + _AT_ONCE]
        got = artifact.values(inputs, [anchor.value for anchor in part])
        expected, single = trace.values(inputs, [anchor.key for anchor in part])
        for anchor in part:
            y, reference = got[anchor.value], expected[anchor.key]
            if _edges(y.shape[1:]) == _edges(reference.shape[1:]) and len(y) == len(reference):
                y = y.reshape(reference.shape)  # a 1×1 map may have lost its axes
            if y.ndim != reference.ndim or not np.issubdtype(y.dtype, np.floating):
                continue  # the artifact computes this value in another form
            floor = None
            try:
                floor = noise_floor(single[anchor.key], reference)
                result = compare(y, reference, classes=False)
            except VerificationError as failure:
                return Straying(anchor, None, floor, str(failure).removeprefix("output "))
            if not is_close(result, floor=floor, precision=artifact.precision):
                return Straying(anchor, result.max_abs, floor)
    return None


def _edges(shape: Sequence[int]) -> list[int]:
    """Return the edges of a shape that are not 1."""
    return [edge for edge in shape if edge != 1]


def _place(key: str) -> tuple[str, str]:
    """Return block and part of a module or a weight."""
    return place_of(re.sub(r"\.(weight|bias)$", "", key))
