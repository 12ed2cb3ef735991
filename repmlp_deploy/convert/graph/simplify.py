"""Simplification with onnxsim, in a child process: a crash there is a refusal here, not the end of the export.

Large weights stay here when nothing could be done to them: no BatchNormalization is left to fold into them, and no
value is in so many products that they are computed as one. The child then sees them as inputs, and hundreds of
megabytes are spared five trips through files and parsers. Most of what is left is the child's imports, so it may be
started before there is a graph.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx

from repmlp_deploy.convert.graph.nodes import name_by_module
from repmlp_deploy.convert.graph.proto import SCOPES, large_weights, restore_weights, serialize_model, without_weights
from repmlp_deploy.errors import MissingDependency

__all__ = ["SimplificationFailed", "Simplifier", "simplifier_started", "simplify_graph"]

TIMEOUT_SECONDS = 600
_PACKED = 3
"""Products of one value that onnxsim packs."""

# torch is not for the child: onnxsim would import it, for seconds, in search of an optional quantizer
_CHILD = """
import sys
sys.modules["torch"] = None
import onnx, onnxsim
source, result = sys.stdin.read().splitlines()
simplified, ok = onnxsim.simplify(onnx.load(source))
if not ok:
    sys.exit("onnxsim's own check failed")
onnx.save(simplified, result)
"""

Simplifier = subprocess.Popen[bytes]
"""A child process that imports onnxsim in advance and waits for one graph."""


class SimplificationFailed(Exception):  # noqa: N818 - an outcome the pipeline handles, not an error of the user's
    """onnxsim crashed, hung or refused; the message says which."""


@contextlib.contextmanager
def simplifier_started() -> Iterator[Simplifier]:
    """Start a child that gets ready while the caller makes the graph; it ends with the context.

    Raises:
        MissingDependency: onnxsim is not installed.
    """
    if importlib.util.find_spec("onnxsim") is None:
        raise MissingDependency("onnxsim", "export")
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-c", _CHILD]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as child:  # noqa: S603 - our own script
        try:
            yield child
        finally:
            child.kill()


def simplify_graph(graph: onnx.ModelProto, simplifier: Simplifier | None = None) -> onnx.ModelProto:
    """Return `graph` with constants folded, redundant nodes removed and metadata kept; the caller verifies it.

    Args:
        graph: does not change.
        simplifier: a child that was started before; by default one is started now.

    Raises:
        SimplificationFailed: onnxsim crashed, hung or refused.
        MissingDependency: onnxsim is not installed.
    """
    if simplifier is None:
        with simplifier_started() as started:
            return simplify_graph(graph, started)
    kept = [] if _changes_weights(graph) else large_weights(graph)
    simplified = _in_child(without_weights(graph, kept, as_inputs=True), simplifier)
    restore_weights(simplified, kept)
    del simplified.metadata_props[:]
    simplified.metadata_props.extend(graph.metadata_props)
    _copy_scopes(graph, simplified)
    name_by_module(simplified)
    return simplified


def _changes_weights(graph: onnx.ModelProto) -> bool:
    """Return whether onnxsim would fold a BatchNormalization, or pack products such as those of q, k and v."""
    products = Counter(node.input[0] for node in graph.graph.node if node.op_type == "MatMul")
    return max(products.values(), default=0) >= _PACKED or any(
        node.op_type == "BatchNormalization" for node in graph.graph.node
    )


def _copy_scopes(graph: onnx.ModelProto, simplified: onnx.ModelProto) -> None:
    """Copy the scopes of nodes onto `simplified`: onnxsim keeps the names of values but no notes on nodes."""
    scopes = {
        name: entry
        for node in graph.graph.node
        for entry in node.metadata_props
        if entry.key == SCOPES
        for name in node.output
    }
    for node in simplified.graph.node:
        if node.output[0] in scopes and not any(entry.key == SCOPES for entry in node.metadata_props):
            node.metadata_props.append(scopes[node.output[0]])


def _in_child(graph: onnx.ModelProto, child: Simplifier) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory(prefix="repmlp-simplify-") as folder:
        source, result = Path(folder, "source.onnx"), Path(folder, "result.onnx")
        source.write_bytes(serialize_model(graph))
        try:
            _, errors = child.communicate(f"{source}\n{result}\n".encode(), timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise SimplificationFailed(f"onnxsim did not finish in {TIMEOUT_SECONDS} s") from None
        if child.returncode < 0:
            raise SimplificationFailed(f"onnxsim crashed with signal {-child.returncode}")
        if child.returncode or not result.is_file():
            said = errors.decode(errors="replace").strip().splitlines() or ["no message"]
            raise SimplificationFailed(f"onnxsim failed: {said[-1]}")
        return onnx.load(result)
