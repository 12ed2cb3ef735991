"""Add long sums in the order of plain runtimes, so that the noise floor covers what float32 needs.

PyTorch adds a long row in a tree, with an error that hardly grows with its length n. Other runtimes keep a few partial
sums and add one element after the other to them: ONNX Runtime's mean over a map keeps eight. Their error grows with
n/8. Measured on means of a random map, against float64:

    map         ONNX Runtime   8 partial sums   PyTorch
    64 x 64        3.0e-7          2.9e-7        1.1e-7
    128 x 128      5.7e-7          5.7e-7        1.1e-7
    256 x 256      1.1e-6          1.0e-6        1.0e-7

So a floor from PyTorch alone would call a correct graph wrong on large maps. The floor is therefore the error of the
trained network whose long sums are added with eight partial sums. Convolutions and matrix products keep their order:
every runtime blocks them alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LONG", "PARTIAL_SUMS", "PlainSums"]

PARTIAL_SUMS = 8
LONG = 256
"""Sums of fewer elements differ by no more than the tolerance covers."""

_ATEN = torch.ops.aten


class PlainSums(TorchDispatchMode):
    """While active, add sums and means over at least `LONG` elements with `PARTIAL_SUMS` partial sums."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation of PyTorch, or its plain form."""
        rule = _RULES.get(func)
        if rule is not None and isinstance(args[0], Tensor) and args[0].is_floating_point():
            found = rule(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _sum(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, **options: Any) -> Tensor | None:
    """Add over `dim`: (…) -> (…), or None where the sum is short."""
    axes = sorted({axis % x.ndim for axis in (dim or range(x.ndim))}) if x.ndim else []
    length = math.prod(x.shape[axis] for axis in axes)
    if length < LONG or options.get("dtype") not in (None, x.dtype):
        return None
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    rows = x.permute(*kept, *axes).reshape(*(x.shape[axis] for axis in kept), length)
    whole = length - length % PARTIAL_SUMS
    steps = rows[..., :whole].reshape(*rows.shape[:-1], -1, PARTIAL_SUMS)  # (…, steps, partial sums)
    total = torch.zeros_like(steps[..., 0, :])
    for step in steps.unbind(-2):
        total = total + step
    result = total[..., 0]
    for part in (*total.unbind(-1)[1:], *rows[..., whole:].unbind(-1)):
        result = result + part
    return result.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)]) if keepdim else result


def _mean(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, **options: Any) -> Tensor | None:
    total = _sum(x, dim, keepdim, **options)
    return None if total is None else total / (x.numel() // total.numel())


def _pool(x: Tensor, output_size: Sequence[int]) -> Tensor | None:
    return _mean(x, (-2, -1), keepdim=True) if tuple(output_size) == (1, 1) else None


def _average(x: Tensor, kernel_size: Sequence[int], _stride: Any = (), padding: Any = 0, *_rest: Any) -> Tensor | None:
    """Average a whole map: (N, C, H, W) -> (N, C, 1, 1)."""
    whole = tuple(kernel_size) == tuple(x.shape[-2:]) and not any([padding] if isinstance(padding, int) else padding)
    return _mean(x, (-2, -1), keepdim=True) if whole else None


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    _ATEN.sum.default: _sum,
    _ATEN.sum.dim_IntList: _sum,
    _ATEN.mean.default: _mean,
    _ATEN.mean.dim: _mean,
    _ATEN.avg_pool2d.default: _average,
    _ATEN._adaptive_avg_pool2d.default: _pool,  # noqa: SLF001 - the operation's own name
}
