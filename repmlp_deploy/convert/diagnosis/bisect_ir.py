"""Bisecting an OpenVINO model: the first value that is not what the traced network computes there.

The nodes of the graph were named after their modules, as `stages.0.1.fc3/MatMul`, and its constants after the weights.
OpenVINO keeps both as friendly names, NNCF as well where it does not replace a constant. So the last node of a name
gives a module's value, and a further result of the model makes it readable. Nodes that OpenVINO made have no such name;
those that give an output have the output's, and stand for whatever module of the trace gives it. A node that took in
the BatchNorm after it has the name of its own module, whose value no node gives then.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmlp_deploy.convert.diagnosis.blame import Blame
from repmlp_deploy.convert.diagnosis.values import Anchor, Arrays, Trace, Values
from repmlp_deploy.convert.graph.lowering.patterns import module_and_parents
from repmlp_deploy.errors import BundleError, MissingDependency, MissingDevice
from repmlp_deploy.runtime.openvino.runner import CompiledIR
from repmlp_deploy.runtime.runner import RunnerOptions

try:
    import openvino as ov
except ImportError:
    raise MissingDependency("openvino", "openvino") from None

__all__ = ["ModelValues"]

_COLUMNS = re.compile(r"\.columns\d+$")  # of a large product that was cut into several
_NO_VALUES = ("Constant", "Parameter", "Result", "ShapeOf")


class ModelValues(Values):
    """An OpenVINO model with its anchors.

    Args:
        ir: topology and constants.
        precision: of the model.

    Raises:
        BundleError: OpenVINO cannot read the model.
    """

    def __init__(self, ir: tuple[bytes, bytes], precision: str) -> None:
        self._ir, self.precision = ir, precision
        try:
            self._model = ov.Core().read_model(*ir)  # kept: its constants are views
        except RuntimeError as error:
            raise BundleError(f"OpenVINO cannot read the model: {error}") from None
        self._nodes = self._model.get_ordered_ops()
        self.end = len(self._nodes)
        results = [output.get_node() for output in self._model.outputs]
        self._outputs = [result.input_value(0).get_node().get_friendly_name() for result in results]
        self._constants: dict[str, list[Any]] = defaultdict(list)  # several where a product was cut by columns
        self._read: dict[int, str] = {}
        for i, node in enumerate(self._nodes):
            if node.get_type_name() == "Constant":
                name = _COLUMNS.sub("", node.get_friendly_name())
                self._constants[name].append(node)
                self._read[i] = name

    def anchors(self, trace: Trace) -> Sequence[Anchor]:
        """Return the last value of every module, and of every weight's own node, in order."""
        found: dict[str, Anchor] = {}
        for i, node in enumerate(self._nodes):
            name = node.get_friendly_name()
            if node.get_type_name() in _NO_VALUES or _COLUMNS.search(name):
                continue
            for key in module_and_parents(_module_of(name)):
                if trace.nodes.get(key) not in trace.normalised:
                    found[key] = Anchor(key, name, i)
        places = {node.get_friendly_name(): i for i, node in enumerate(self._nodes)}
        for name, traced in zip(self._outputs, trace.outputs, strict=True):
            for key in [key for key, node in trace.nodes.items() if node == traced]:
                found[key] = Anchor(key, name, places[name])
        return sorted(found.values(), key=lambda anchor: anchor.index)

    def values(self, inputs: Arrays, names: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """Compute the values of the nodes of these names."""
        further = [name for name in dict.fromkeys(names) if name not in self._outputs]
        compiled = CompiledIR(lambda: self._ir, self.precision, RunnerOptions(), further=further)
        return dict(zip([*self._outputs, *further], compiled.run_all(*inputs), strict=True))

    def failure(self, inputs: Arrays) -> Blame | None:
        """Return what OpenVINO says where the model does not run; it names no node."""
        try:
            self.values(inputs, [])
        except MissingDevice:
            raise
        except (BundleError, RuntimeError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[-1].strip()
            return Blame("input", "", f"the model fails at batch {len(inputs[0])}: {said}")
        return None

    def weights_read(self, index: int) -> Sequence[str]:
        """Return the name of a constant at its own place: it stands right before the node that reads it."""
        return [self._read[index]] if index in self._read else []

    def stored(self, weight: str) -> NDArray[Any] | None:
        """Return a constant of a floating type as float32."""
        parts = [values for node in self._constants.get(weight, ()) for values in _floats(node)]
        return np.concatenate(parts, axis=-1) if parts else None

    def operation(self, anchor: Anchor) -> tuple[str, str]:
        """Return the module of an anchor's node, and its type and name."""
        node = self._nodes[anchor.index]
        return _module_of(node.get_friendly_name()), f"{node.get_type_name()} {node.get_friendly_name()}"


def _module_of(name: str) -> str:
    """Return the module that a node is named after; empty if it is named after none."""
    module, slash, _ = name.partition("/")
    return module if slash else ""


def _floats(constant: Any) -> Iterator[NDArray[np.float32]]:
    """Yield the values of a constant if they are floating-point numbers."""
    kind = constant.get_element_type().get_type_name()
    if kind == "bf16":  # the upper half of float32
        yield (constant.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif kind in ("f16", "f32"):
        yield constant.data.astype(np.float32)
