"""NVIDIA's two runtimes: the Python module of each, and who compiles its kernels."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FLAVOURS", "Flavour"]


@dataclass(frozen=True)
class Flavour:
    """What runs a format.

    Attributes:
        module: its Python module.
        extra: the extra of this project that brings it.
        compiles: whether it compiles kernels where the engine runs, keeps them in a cache, and captures graphs itself.
    """

    module: str
    extra: str
    compiles: bool


FLAVOURS = {
    "trt": Flavour("tensorrt", "trt", compiles=False),
    "trt-rtx": Flavour("tensorrt_rtx", "rtx", compiles=True),
}
"""Artifact format to what runs it; the builders in `convert.formats.tensorrt.flavours` refer to it."""
