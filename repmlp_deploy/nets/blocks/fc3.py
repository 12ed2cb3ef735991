"""What the RepMLP blocks of 2021 and 2022 share: FC3 with its branches, and its recognition in other packages.

An unmerged block has a 1×1 convolution `fc3` without a bias, a BatchNorm `fc3_bn`, and branches `repconvK` of a `conv`
and a `bn`. No tensor shows the edges of the partition: they are attributes, `h` and `w` or `path_h` and `path_w`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repmlp_deploy.nets.blocks.algebra import BatchNorm, constant
from repmlp_deploy.nets.blocks.checks import Finding
from repmlp_deploy.nets.blocks.conv_bn import ConvBN
from repmlp_deploy.nets.blocks.terms import MergedSum, Term, toeplitz_columns

__all__ = [
    "as_batch_norm",
    "branches_of",
    "fc3_terms",
    "has_trained_fc3",
    "partition_edges",
    "stored_fc3",
    "wrong_partition",
]

_EDGES = (("h", "w"), ("path_h", "path_w"))


def has_trained_fc3(module: nn.Module) -> bool:
    """Return whether `module` has the FC3 of a RepMLP block that is not merged yet."""
    fc3, bn = getattr(module, "fc3", None), getattr(module, "fc3_bn", None)
    return isinstance(fc3, nn.Conv2d) and fc3.bias is None and fc3.kernel_size == (1, 1) and _is_norm(bn)


def as_batch_norm(norm: Any, kind: type[BatchNorm] = nn.BatchNorm2d) -> Any:
    """Return a BatchNorm, or for a frozen one of another package a BatchNorm that shares its tensors.

    Frozen ones of some packages have no eps and add nothing to the variance.
    """
    if isinstance(norm, BatchNorm):
        return norm
    made = kind(len(norm.running_var), eps=float(getattr(norm, "eps", 0.0)), device="meta").eval()
    made.weight, made.bias = constant(norm.weight), constant(norm.bias)
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    return made


def _is_norm(module: Any) -> bool:
    """Return whether `module` is a BatchNorm, or has all that a frozen one has."""
    parts = ("running_mean", "running_var", "weight", "bias")
    return isinstance(module, BatchNorm) or all(isinstance(getattr(module, part, None), Tensor) for part in parts)


def partition_edges(block: nn.Module) -> tuple[int, int]:
    """Return the (h, w) of a foreign block.

    Raises:
        ValueError: the block has no attributes that tell it.
    """
    for names in _EDGES:
        h, w = (getattr(block, name, None) for name in names)
        if isinstance(h, int) and isinstance(w, int):
            return h, w
    said = " or ".join(f"{h} and {w}" for h, w in _EDGES)
    raise ValueError(f"its partition is unknown: set the attributes {said}")


def branches_of(block: nn.Module) -> dict[int, ConvBN]:
    """Return the branches of a foreign block as ours, by kernel k; they share the tensors."""
    found: dict[int, ConvBN] = {}
    for name, child in block.named_children():
        if kernel := re.fullmatch(r"repconv(\d+)", name):
            parts: Any = child
            found[int(kernel[1])] = ConvBN.from_parts(parts.conv, as_batch_norm(parts.bn))
    return found


def fc3_terms(  # noqa: PLR0913 - the parts of a block
    fc3: nn.Conv2d,
    fc3_bn: BatchNorm,
    branches: Sequence[ConvBN],
    partition: tuple[int, int],
    group: int,
    columns: Tensor | None,
) -> list[Term]:
    """Return FC3 and the branches as terms, for one group and some columns of it; see `Reparameterizable.terms`."""
    h, w = partition
    groups, area = fc3.groups, h * w
    matrix = fc3.weight.detach().double().view(groups, -1, fc3.in_channels // groups)[group]
    outputs = len(matrix) // area  # O/g
    channels = torch.arange(outputs).repeat_interleave(area) + group * outputs
    per_row = fc3_bn.num_features != groups * outputs  # in 2021, fc3_bn has a channel for every row
    rows = torch.arange(len(matrix)) + group * len(matrix) if per_row else channels
    columns = torch.arange(matrix.shape[1]) if columns is None else columns
    terms = [Term("fc3 · fc3_bn", fc3_bn, rows, matrix[:, columns])]
    for branch in branches:
        kernel = branch.conv.weight.detach().double()[group * outputs : (group + 1) * outputs]
        label = f"fc3 · branch repconv{kernel.shape[-1]}"
        terms.append(Term(label, branch.bn, channels, toeplitz_columns(kernel, h, w, columns), kernel))
    return terms


def stored_fc3(trained: nn.Conv2d, merged: nn.Conv2d, partition: tuple[int, int]) -> MergedSum | None:
    """Return the matrices of a merged FC3; None where it has no bias or other groups than the trained one."""
    if merged.bias is None or merged.groups != trained.groups:
        return None
    rows = merged.out_channels // merged.groups
    weight = merged.weight.detach().view(merged.groups, rows, -1)
    return MergedSum(weight, merged.bias.detach().view(merged.groups, rows), partition=partition)


def wrong_partition(expected: tuple[int, int], made: nn.Module) -> Finding | None:
    """Return what is wrong with the partition of a merged or folded block; None where nothing is."""
    h, w = getattr(made, "h", None), getattr(made, "w", None)
    if h is None or w is None or (h, w) == expected:
        return None
    fault = "h and w swapped" if (w, h) == expected else "another partition"
    return Finding("fc3 · partition", f"{fault}: {h}x{w}, expected {expected[0]}x{expected[1]}")
