"""Simplification with onnxsim, in a child process: a crash there is a refusal here, not the end of the export.

Large weights stay here when nothing could be folded into them, that is when no BatchNormalization is left: the child
sees them as inputs, and hundreds of megabytes are spared five trips through files and parsers.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from repmlp_deploy.errors import MissingDependency

__all__ = ["SimplificationFailed", "simplify_graph"]

TIMEOUT_SECONDS = 600
LARGE_BYTES = 1 << 16

_CHILD = """
import sys, onnx, onnxsim
simplified, ok = onnxsim.simplify(onnx.load(sys.argv[1]))
if not ok:
    sys.exit("onnxsim's own check failed")
onnx.save(simplified, sys.argv[2])
"""


class SimplificationFailed(Exception):  # noqa: N818 - an outcome the pipeline handles, not an error of the user's
    """onnxsim crashed, hung or refused; the message says which."""


def simplify_graph(graph: onnx.ModelProto) -> onnx.ModelProto:
    """`graph` with constants folded and redundant nodes gone, its metadata kept. To be verified like any other step.

    Raises:
        SimplificationFailed: onnxsim crashed, hung or refused.
        MissingDependency: onnxsim is not installed.
    """
    if importlib.util.find_spec("onnxsim") is None:
        raise MissingDependency("onnxsim", "export")
    foldable = any(node.op_type == "BatchNormalization" for node in graph.graph.node)
    kept = [] if foldable else [t for t in graph.graph.initializer if len(t.raw_data) >= LARGE_BYTES]
    simplified = _in_child(_without(graph, kept))
    _restore(simplified, kept)
    del simplified.metadata_props[:]
    simplified.metadata_props.extend(graph.metadata_props)
    return simplified


def _in_child(graph: onnx.ModelProto) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory(prefix="repmlp-simplify-") as folder:
        source, result = Path(folder, "source.onnx"), Path(folder, "result.onnx")
        onnx.save(graph, source)
        try:
            child = subprocess.run(  # noqa: S603 - our own interpreter and script
                [sys.executable, "-P", "-c", _CHILD, str(source), str(result)],
                capture_output=True,
                check=False,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise SimplificationFailed(f"onnxsim did not finish in {TIMEOUT_SECONDS} s") from None
        if child.returncode < 0:
            raise SimplificationFailed(f"onnxsim crashed with signal {-child.returncode}")
        if child.returncode or not result.is_file():
            said = child.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise SimplificationFailed(f"onnxsim failed: {said[-1]}")
        return onnx.load(result)


def _without(graph: onnx.ModelProto, weights: Sequence[onnx.TensorProto]) -> onnx.ModelProto:
    """`graph` with `weights` as inputs; nothing large is copied."""
    if not weights:
        return graph
    names = {tensor.name for tensor in weights}
    result = onnx.ModelProto(ir_version=graph.ir_version, opset_import=graph.opset_import, functions=graph.functions)
    result.graph.name = graph.graph.name
    result.graph.node.extend(graph.graph.node)
    result.graph.input.extend(graph.graph.input)
    result.graph.output.extend(graph.graph.output)
    result.graph.value_info.extend(graph.graph.value_info)
    result.graph.initializer.extend(t for t in graph.graph.initializer if t.name not in names)
    for tensor in weights:
        result.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return result


def _restore(graph: onnx.ModelProto, weights: Sequence[onnx.TensorProto]) -> None:
    """Turn the inputs that stand for `weights` back into initializers; those that nothing reads any more go."""
    names = {tensor.name for tensor in weights}
    inputs = [value for value in graph.graph.input if value.name not in names]
    del graph.graph.input[:]
    graph.graph.input.extend(inputs)
    read = {name for node in graph.graph.node for name in node.input}
    graph.graph.initializer.extend(tensor for tensor in weights if tensor.name in read)
