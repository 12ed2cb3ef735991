"""The module of the network that a node of an ONNX graph belongs to: the only reader of the exporter's scopes.

The exporter notes the *scopes* of a node: the network, the modules inside it, the outermost first, and the operation.
A node that reads `stages.0.1.fc3.weight` belongs to `stages.0.1.fc3` whatever the scopes say: the code around a layer
may use its weight without calling it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from repmlp_deploy.convert.graph.lowering.names import parameter_of
from repmlp_deploy.convert.graph.lowering.patterns import module_and_parents
from repmlp_deploy.convert.graph.proto import SCOPES
from repmlp_deploy.errors import MissingDependency

try:
    import onnx
except ImportError:
    raise MissingDependency("onnx", "rtx") from None

__all__ = ["module_of", "modules_around", "name_by_module", "names_of", "node_modules", "scopes_of"]


def scopes_of(node: onnx.NodeProto) -> list[str]:
    """Return the network, the modules inside it, the outermost first, and the operation; empty without a valid note."""
    noted = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    try:
        scopes = ast.literal_eval(noted)
    except (ValueError, SyntaxError):
        return []
    return [str(scope) for scope in scopes]


def modules_around(node: onnx.NodeProto) -> list[str]:
    """Return the modules that a node lies in, the outermost first, without the network itself."""
    return [scope for scope in scopes_of(node)[:-1] if scope]


def module_of(node: onnx.NodeProto) -> str:
    """Return the module of a node by the weight it reads, or by its innermost scope; empty if neither says one."""
    for name in map(parameter_of, node.input[1:]):
        if name.endswith((".weight", ".bias")):
            return str(name.rpartition(".")[0])
        if "." in name:
            return str(name)
    return _innermost(node)


def node_modules(graph: bytes) -> dict[str, str]:
    """Return the module of every node of a serialized graph that has one; empty if the bytes are no graph."""
    try:
        nodes = onnx.load_from_string(graph).graph.node
    except Exception:  # noqa: BLE001 - protobuf's errors have no common root
        return {}
    found = {node.name: module_of(node) for node in nodes}
    return {name: module for name, module in found.items() if module}


def names_of(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every name that a pattern may mean: the node, its modules, and the modules around them."""
    yield node.name
    for module in (module_of(node), _innermost(node)):
        yield from module_and_parents(module)


def name_by_module(graph: onnx.ModelProto) -> None:
    """Name every node after its module and operator, as `stages.0.1.fc3/MatMul`, in place; repeated names get numbers.

    Profilers and TensorRT's logs show these names, and `--keep-fp32` takes them.
    """
    seen: dict[str, int] = {}
    for node in graph.graph.node:
        name = "/".join(part for part in (module_of(node), node.op_type) if part)
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _innermost(node: onnx.NodeProto) -> str:
    scopes = scopes_of(node)
    return scopes[-2] if len(scopes) > 1 else ""
