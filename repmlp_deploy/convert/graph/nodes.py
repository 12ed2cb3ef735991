"""Which module of the network a node of a serialized ONNX graph came from, to be read when something failed."""

from __future__ import annotations

import ast
from contextlib import suppress

from repmlp_deploy.convert.graph.proto import SCOPES
from repmlp_deploy.errors import MissingDependency

try:
    import onnx
except ImportError:
    raise MissingDependency("onnx", "rtx") from None

__all__ = ["node_module", "node_modules"]


def node_modules(graph: bytes) -> dict[str, str]:
    """Node to the module it computes a part of, as far as the graph tells by scopes or by the weights a node reads."""
    try:
        nodes = onnx.load_from_string(graph).graph.node
    except Exception:  # noqa: BLE001 - what is no graph has no modules; protobuf's errors have no common root
        return {}
    found = {node.name: node_module(node) for node in nodes}
    return {name: module for name, module in found.items() if module}


def node_module(node: onnx.NodeProto) -> str:
    """The innermost module a node is of, `stages.0.1.gp.fc1`: by its scopes, or else by its weights; empty for none."""
    return _by_scopes(node) or _by_weights(node)


def _by_scopes(node: onnx.NodeProto) -> str:
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            with suppress(ValueError, SyntaxError):
                scopes = ast.literal_eval(entry.value)
                return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def _by_weights(node: onnx.NodeProto) -> str:
    """`stages.0.1.gp.fc1` of `stages.0.1.gp.fc1.weight`."""
    dotted = [name for name in node.input[1:] if "." in name]
    return dotted[0].rpartition(".")[0] if dotted else ""
