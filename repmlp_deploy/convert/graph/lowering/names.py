"""The names of weights in a lowered graph: that of the parameter, with the type after it."""

from __future__ import annotations

from repmlp_deploy.precision import PRECISIONS

__all__ = ["lowered_name", "parameter_of"]


def lowered_name(name: str, onnx_type: str) -> str:
    """Return the name of a weight in a type of `TensorProto.DataType`."""
    return f"{name}_{onnx_type.lower()}"


def parameter_of(name: str) -> str:
    """Return the name of a weight without the type of any precision that a graph is lowered to."""
    ends = (lowered_name("", entry.onnx_type) for entry in PRECISIONS.values() if entry.lowering != "none")
    return name.removesuffix(next((end for end in ends if name.endswith(end)), ""))
