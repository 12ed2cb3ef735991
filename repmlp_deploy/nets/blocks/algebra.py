"""The algebra of structural re-parameterization: tensors in, tensors out.

A BatchNorm in evaluation mode is affine: BN(y) = a·y + b with a = γ/√(σ² + ε) and b = β − μ·a.
Behind a linear map it is absorbed exactly: BN(W x + c) = (a W) x + (a c + b).

A k×k convolution with padding k//2 on an (h, w) map is the product with a doubly blocked Toeplitz matrix,

    T[(y, x), (y + dy, x + dx)] = K[dy + k//2, dx + k//2]   wherever (y + dy, x + dx) lies inside the map,

so k² diagonals, which never meet, hold all of it. They are reached as strided views of the matrix, which takes
milliseconds where convolving an identity takes seconds, and works in any dtype.

A RepMLP block sums FC3 and its branches, each followed by a BatchNorm, so for every group

    W' = a₃ W₃ + Σ_k T(a_k K_k),      b' = b₃ + Σ_k b_k.

Everything here computes in float64: branch sums cancel, and the result is rounded once, on storing.

Sources: RepMLP, arXiv 2105.01883, section 3.2; RepMLPNet, CVPR 2022, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = [
    "BatchNorm",
    "affine_of_batch_norm",
    "check_kernel",
    "constant",
    "conv_of_affine",
    "convolution_with",
    "fuse_batch_norm",
    "grouped_product",
    "has_batch_norms",
    "scale_rows",
    "set_convolution",
    "sum_kernels",
]

CHUNK = 1 << 18  # elements of float64 worked on at a time: 2 MiB, what a core keeps close

BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - torch offers no public name for 1d, 2d and 3d alike


def affine_of_batch_norm(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the (a, b) of BN(y) = a·y + b in evaluation mode, each (channels,) float64.

    Raises:
        ValueError: `bn` keeps no running statistics, so it has no evaluation mode.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("BatchNorm keeps no running statistics: it cannot be absorbed")
    mean, variance = bn.running_mean.double(), bn.running_var.double()
    deviation = torch.sqrt(variance + bn.eps)
    scale = deviation.reciprocal() if bn.weight is None else bn.weight.detach().double() / deviation
    shift = -mean * scale if bn.bias is None else bn.bias.detach().double() - mean * scale
    return scale, shift


def has_batch_norms(network: nn.Module) -> bool:
    """Return whether a BatchNorm is left anywhere in `network`."""
    return any(isinstance(module, BatchNorm) for module in network.modules())


def convolution_with(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a convolution of the same geometry as `conv` with other weights, stored in its dtype."""
    result = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        groups=conv.groups,
        device="meta",
    )
    result.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    result.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    return result


def fuse_batch_norm(conv: nn.Conv2d, bn: BatchNorm) -> nn.Conv2d:
    """Return BN(conv(x)) as one convolution."""
    a, b = affine_of_batch_norm(bn)
    bias = b if conv.bias is None else a * conv.bias.detach().double() + b
    return convolution_with(conv, conv.weight.detach() * a[:, None, None, None], bias)


def conv_of_affine(conv: nn.Conv2d, a: Tensor, b: Tensor) -> nn.Conv2d:
    """Return conv(a·x + b) as one convolution, for a 1×1 kernel without padding or groups."""
    weight = conv.weight.detach().double()
    bias = weight[:, :, 0, 0] @ b
    return convolution_with(conv, weight * a[:, None, None], bias if conv.bias is None else bias + conv.bias.detach())


def check_kernel(k_h: int, k_w: int) -> None:
    """Raise unless a (k_h, k_w) kernel with padding k//2 keeps the size of its map, that is unless both are odd."""
    if k_h % 2 == 0 or k_w % 2 == 0:
        raise ValueError(f"branch kernel is {k_h}x{k_w}; only odd kernels keep the size of the map they merge into")


def sum_kernels(kernels: Iterable[Tensor]) -> Tensor | None:
    """Add kernels (..., k_h, k_w) of any odd sizes, each centred in the largest: one Toeplitz matrix serves all.

    Returns float64, or None when there is no kernel.
    """
    kernels = list(kernels)
    if not kernels:
        return None
    for kernel in kernels:
        check_kernel(*kernel.shape[-2:])
    k_h = max(kernel.shape[-2] for kernel in kernels)
    k_w = max(kernel.shape[-1] for kernel in kernels)
    total = kernels[0].new_zeros((*kernels[0].shape[:-2], k_h, k_w), dtype=torch.float64)
    for kernel in kernels:
        top, left = (k_h - kernel.shape[-2]) // 2, (k_w - kernel.shape[-1]) // 2
        total[..., top : top + kernel.shape[-2], left : left + kernel.shape[-1]] += kernel
    return total


def scale_rows(matrix: Tensor, scale: Tensor) -> Tensor:
    """Return diag(scale) @ matrix, computed in float64 and stored in the dtype of `matrix`.

    Args:
        matrix: (rows, columns).
        scale: (rows,) float64.
    """
    result = torch.empty_like(matrix)
    step = max(1, CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):  # by chunks: a float64 copy of all FC3 weights would not fit a cache
        rows = slice(start, start + step)
        result[rows] = matrix[rows] * scale[rows, None]  # promoted to float64
    return result


def set_convolution(result: Tensor, matrix: Tensor, scale: Tensor, kernel: Tensor) -> None:
    """Set the diagonals of T(kernel) in `result` to those of diag(scale) @ matrix + T(kernel), in place.

    With `scale_rows` for the other entries, `result` is the merged matrix, every entry rounded once.

    Args:
        result: (..., h, w, h, w): output position, then input position; any strides.
        matrix: like `result`.
        scale: (..., h, w) float64, one factor an output position.
        kernel: (..., k_h, k_w) float64, odd.
    """
    h, w = matrix.shape[-4:-2]
    reach_y, reach_x = kernel.shape[-2] // 2, kernel.shape[-1] // 2
    for dy in range(max(-reach_y, 1 - h), min(reach_y, h - 1) + 1):
        for dx in range(max(-reach_x, 1 - w), min(reach_x, w - 1) + 1):
            y, x = max(0, -dy), max(0, -dx)  # the first output position whose input lies inside the map
            inside = scale[..., y : y + h - abs(dy), x : x + w - abs(dx)]
            tap = kernel[..., dy + reach_y, dx + reach_x, None, None]
            _diagonal(result, dy, dx).copy_(_diagonal(matrix, dy, dx) * inside + tap)


def _diagonal(matrix: Tensor, dy: int, dx: int) -> Tensor:
    """Return the entries [(y, x), (y + dy, x + dx)] of (..., h, w, h, w), as a view (..., h - |dy|, w - |dx|)."""
    h, w = matrix.shape[-4:-2]
    *lead, out_y, out_x, in_y, in_x = matrix.stride()
    y, x = max(0, -dy), max(0, -dx)
    return torch.as_strided(
        matrix,
        (*matrix.shape[:-4], h - abs(dy), w - abs(dx)),
        (*lead, out_y + in_y, out_x + in_x),
        matrix.storage_offset() + y * out_y + x * out_x + (y + dy) * in_y + (x + dx) * in_x,
    )


def grouped_product(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply every group's part of every row by the group's matrix: (M, g·K), (g, K, R) -> (M, g·R)."""
    groups, K, R = weight.shape
    if groups == 1:
        return rows @ weight[0]
    y = rows.reshape(-1, groups, K).transpose(0, 1) @ weight  # (g, M, K) × (g, K, R)
    return y.transpose(0, 1).contiguous().view(-1, groups * R)


def constant(value: Tensor) -> nn.Parameter:
    """Return `value` as a parameter that is never trained."""
    return nn.Parameter(value, requires_grad=False)
