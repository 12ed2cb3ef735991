"""TensorRT-RTX as a plugin of ONNX Runtime: the package that brings the library."""

from __future__ import annotations

from pathlib import Path

from repmlp_deploy.errors import MissingDependency

try:
    import onnxruntime_ep_nv_tensorrt_rtx as plugin
except ImportError:
    raise MissingDependency("onnxruntime-ep-nv-tensorrt-rtx", "ort-rtx") from None

__all__ = ["library_path"]


def library_path() -> Path:
    """Return the library that ONNX Runtime loads."""
    return Path(plugin.get_library_path())
