"""The result of lowering, and what both lowerings share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from repmlp_deploy.convert.graph.proto import large_weights, without_weights
from repmlp_deploy.errors import MissingDependency

try:
    import onnx
    from onnx import NodeProto, TensorProto, helper
except ImportError:
    raise MissingDependency("onnx", "export") from None

__all__ = ["BY_PATTERN", "PRODUCTS", "Kept", "Lowered", "is_product", "rebuild"]

PRODUCTS = ("Conv", "Gemm", "MatMul")
BY_PATTERN = "kept by pattern"


@dataclass(frozen=True)
class Kept:
    """A node that stays in float32.

    Attributes:
        node: its name in the graph.
        op: its operator.
        module: of the network, as far as the node's weights tell it.
        reason: why.
    """

    node: str
    op: str
    module: str
    reason: str


@dataclass(frozen=True)
class Lowered:
    """A graph in a precision, and what of it is not.

    Attributes:
        model: the graph; inputs and outputs are float32.
        lowered: operator to how many nodes of it compute in the precision.
        kept: nodes that stay in float32.
    """

    model: onnx.ModelProto
    lowered: dict[str, int]
    kept: tuple[Kept, ...]

    def describe(self) -> dict[str, Any]:
        """Return the report: counts of what was lowered, products that were not by name, the rest by reason."""
        products = [k for k in self.kept if k.op in PRODUCTS]
        rest = Counter((k.op, k.reason) for k in self.kept if k.op not in PRODUCTS)
        return {
            "lowered": dict(self.lowered),
            "kept_fp32": [{"node": k.node, "op": k.op, "module": k.module, "reason": k.reason} for k in products]
            + [{"op": op, "count": count, "reason": reason} for (op, reason), count in sorted(rest.items())],
        }


def is_product(node: NodeProto, weights: Collection[str]) -> bool:
    """Return whether a node multiplies by a constant weight."""
    return node.op_type in PRODUCTS and len(node.input) > 1 and node.input[1] in weights


def rebuild(
    graph: onnx.ModelProto, nodes: Sequence[NodeProto], weights: Iterable[TensorProto], opset: int
) -> onnx.ModelProto:
    """Return a checked model of other nodes and weights, with the borders and metadata of `graph`."""
    made = helper.make_graph(nodes, graph.graph.name, graph.graph.input, graph.graph.output, list(weights))
    imports = [helper.make_opsetid(graph.opset_import[0].domain, opset), *graph.opset_import[1:]]
    model = helper.make_model(made, opset_imports=imports, ir_version=graph.ir_version, producer_name="repmlp-deploy")
    model.metadata_props.extend(graph.metadata_props)
    onnx.checker.check_model(without_weights(model, large_weights(model), as_inputs=True), full_check=True)
    return model
