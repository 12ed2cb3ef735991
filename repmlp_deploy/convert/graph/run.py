"""Run a serialized graph in ONNX Runtime on the CPU, to compare it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import onnx
from numpy.typing import NDArray

from repmlp_deploy.convert.graph.emulate import runnable_graphs
from repmlp_deploy.convert.graph.proto import serialize_model
from repmlp_deploy.errors import BundleError, VerificationError
from repmlp_deploy.runtime.onnx.runner import open_session
from repmlp_deploy.runtime.runner import RunnerOptions

__all__ = ["onnx_run", "said_by_runtime", "ways_to_run"]


def onnx_run(data: bytes) -> Callable[..., list[NDArray[Any]]]:
    """Return a function from inputs by position to the outputs in order.

    Raises:
        VerificationError: ONNX Runtime does not open the graph, or later does not run it.
    """
    try:
        session, _ = open_session(data, RunnerOptions(device="cpu"))
    except BundleError as error:
        raise VerificationError(str(error)) from None
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: NDArray[Any]) -> list[NDArray[Any]]:
        try:
            outputs: list[NDArray[Any]] = session.run(None, dict(zip(names, inputs, strict=True)))
        except Exception as error:  # onnxruntime's exceptions share no public base
            said = said_by_runtime(error)
            raise VerificationError(f"ONNX Runtime cannot run the graph at batch {len(inputs[0])}: {said}") from error
        return outputs

    return run


def ways_to_run(model: onnx.ModelProto, data: bytes, precision: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and graph of every way to run a precision on a CPU: unchanged, and as a GPU would round."""
    for name, runnable in runnable_graphs(model, precision):
        yield name, data if runnable is model else serialize_model(runnable)


def said_by_runtime(error: Exception) -> str:
    """Return what ONNX Runtime complains of, without its own codes and source files."""
    said = " ".join(str(error).split())
    for before in (r"^.*\[ONNXRuntimeError\] : \d+ : \w+ : ", r"^.* Status Message: ", r"^.* was false\. "):
        said = re.sub(before, "", said)
    return said[:200]
