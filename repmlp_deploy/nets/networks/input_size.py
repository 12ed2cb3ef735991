"""Check the shape of a network's input."""

from __future__ import annotations

from torch import Tensor

__all__ = ["require_input"]


def require_input(x: Tensor, channels: int, size: tuple[int, int]) -> None:
    """Raise ValueError unless `x` is (N, channels, *size)."""
    if tuple(x.shape[1:]) != (channels, *size):
        raise ValueError(f"input is {tuple(x.shape)}; this network takes (N, {channels}, {size[0]}, {size[1]})")
