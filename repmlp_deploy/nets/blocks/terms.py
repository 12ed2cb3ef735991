"""Terms: the summands of a merged matrix, and the faults that a merged matrix reveals.

With a·y + b the evaluation-mode form of a BatchNorm, a merged matrix is a sum of terms M_i, each before a BatchNorm,

    W' = Σ_i a_i M_i,      b' = Σ_i b_i.

In a RepMLP block M_3 = W_3 is FC3, and M_k = T(K_k) is the Toeplitz matrix of branch k, made here by convolving unit
maps. So a fault in one term leaves a residual that only this term explains: W − W' = −a_k M_k where branch k was
dropped, +a_k M_k where it was added twice, (ã_k − a_k) M_k where its BatchNorm was taken for something else,
a_k (M̃ − M) where its taps lie elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.algebra import BatchNorm
from repmlp_deploy.nets.blocks.checks import Check, Fault, affine_by_running, wrong_affines

__all__ = ["MergedSum", "Term", "Terms", "merged_checks", "merged_matrix", "toeplitz_columns"]

_COLUMNS = 128  # of a matrix, judged or made at a time


@dataclass(frozen=True)
class Term:
    """One summand BN(M x) of a group's merged matrix.

    Attributes:
        label: what to call it, `fc3 · branch repconv3`.
        bn: its BatchNorm.
        channels: (R,) the channel of the BatchNorm that every row has.
        matrix: (R, K) float64; M, or the columns that were asked for.
        kernel: (O/g, C/g, k, k) float64 of a convolution branch; None for a plain matrix.
    """

    label: str
    bn: BatchNorm
    channels: Tensor
    matrix: Tensor
    kernel: Tensor | None = None

    def scaled(self, a: Tensor) -> Tensor:
        """Return diag(a) M, (R, K)."""
        return a[self.channels, None] * self.matrix


class Terms(Protocol):
    """A trained block that knows its summands."""

    def terms(self, group: int, columns: Tensor | None = None) -> list[Term]:
        """Return the summands of one group, or of some columns of it."""
        ...


@dataclass(frozen=True)
class MergedSum:
    """Where a merged or folded module stores the sum of a block's terms.

    Attributes:
        weight: (groups, R, K), as stored.
        bias: (groups, R), as stored.
        part: of the block that stores them, for the message; the labels of terms begin with it.
        name: of the stored tensors.
        partition: (h, w) of the map that columns and rows are positions of.
    """

    weight: Tensor
    bias: Tensor
    part: str = "fc3"
    name: str = "fc3"
    partition: tuple[int, int] = (1, 1)


def merged_matrix(block: Terms, group: int) -> tuple[Tensor, Tensor]:
    """Return W' (R, K) and b' (R,) of one group of a trained block, float64."""
    return _sum(block.terms(group))


def merged_checks(block: Terms, stored: MergedSum) -> Iterator[Check]:
    """Yield the checks of a stored sum: its worst group's matrix, then its worst group's bias."""
    weight, bias, part = stored.weight, stored.bias, stored.part
    expected = [merged_matrix(block, g) for g in range(len(weight))]
    for index, got, label in ((0, weight, "weight"), (1, bias, "bias")):
        values = [pair[index] for pair in expected]
        worst = max(range(len(got)), key=lambda g: _error(got[g], values[g]))
        columns = _telling_columns(weight[worst], expected[worst][0])

        def faults(g: int = worst, index: int = index, columns: Tensor = columns) -> Iterator[Fault]:
            for place, what, *pair in _merged_faults(block, g, expected[g][0], columns, stored):
                yield place, what, pair[index]
            for other in range(len(expected)):
                if other != g:
                    value = expected[other][index] if index else expected[other][0][:, columns]
                    yield part, f"shareset {g} holds what belongs to shareset {other}", value

        where = None if index else columns
        yield Check(part, f"{stored.name}.{label}", got[worst], values[worst], faults, group=(worst,), columns=where)


def _telling_columns(got: Tensor, expected: Tensor) -> Tensor:
    """Return the columns that judge hypotheses: all of a small matrix, the worst and some others of a large one."""
    count = expected.shape[1]
    if count <= _COLUMNS or got.shape != expected.shape:
        return torch.arange(count)
    error = (got.double() - expected).abs().amax(dim=0)
    worst = error.nan_to_num(nan=math.inf).topk(_COLUMNS // 2).indices
    spread = torch.linspace(0, count - 1, _COLUMNS // 2).long()
    return torch.tensor(sorted({*worst.tolist(), *spread.tolist()}))


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max().nan_to_num(nan=math.inf)) if got.shape == expected.shape else 0.0


def _sum(terms: Iterable[Term]) -> tuple[Tensor, Tensor]:
    weights, biases = [], []
    for term in terms:
        a, b = affine_by_running(term.bn)
        weights.append(term.scaled(a))
        biases.append(b[term.channels])
    return sum(weights[1:], weights[0]), sum(biases[1:], biases[0])


def _merged_faults(
    block: Terms, group: int, merged: Tensor, columns: Tensor, stored: MergedSum
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Yield (part, fault, W, b) for every known fault: some columns of the group whose right matrix is `merged`."""
    part, (h, w) = stored.part, stored.partition
    terms = block.terms(group, columns)
    branches = [term for term in terms if term.kernel is not None]
    weight, bias = _sum(terms)
    for term in terms:
        yield from _wrong_norms(term.label, [term], weight, bias)
    yield from _wrong_norms(f"{part} · every BatchNorm", terms, weight, bias)
    for term in branches:
        yield from _wrong_places(term.label, [term], stored.partition, columns, weight, bias)
    yield from _wrong_places(f"{part} · every branch", branches, stored.partition, columns, weight, bias)
    if h * w > 1 or len(merged) == merged.shape[1]:
        yield part, "matrix transposed", _transposed(merged, h * w)[:, columns], bias


def _wrong_norms(
    label: str, terms: Sequence[Term], weight: Tensor, bias: Tensor
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    for wrong in zip(*(wrong_affines(term.bn) for term in terms), strict=False):
        W, b = weight, bias
        for term, (_, a_wrong, b_wrong) in zip(terms, wrong, strict=True):
            a_right, b_right = affine_by_running(term.bn)
            W, b = W + term.scaled(a_wrong - a_right), b + (b_wrong - b_right)[term.channels]
        yield label, wrong[0][0], W, b


def _wrong_places(  # noqa: PLR0913 - what is wrong, and what of
    label: str, terms: Sequence[Term], partition: tuple[int, int], columns: Tensor, weight: Tensor, bias: Tensor
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    for wrong in zip(*(_wrong_matrices(term, partition, columns) for term in terms), strict=True):
        W = weight
        for term, (_, matrix) in zip(terms, wrong, strict=True):
            W = W + affine_by_running(term.bn)[0][term.channels, None] * (matrix - term.matrix)
        yield label, wrong[0][0], W, bias


def _wrong_matrices(term: Term, partition: tuple[int, int], columns: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (fault, M) of a branch whose taps lie elsewhere."""
    if term.kernel is None:
        return
    h, w = partition
    yield "Toeplitz matrix transposed", toeplitz_columns(term.kernel.flip(-2, -1), h, w, columns)
    yield "kernel transposed", toeplitz_columns(term.kernel.transpose(-2, -1), h, w, columns)
    yield "h and w swapped", toeplitz_columns(term.kernel, w, h, columns)
    padded = F.pad(term.kernel, (1, 1, 1, 1))
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            if dy or dx:
                yield "padding off by one", toeplitz_columns(padded.roll((dy, dx), dims=(-2, -1)), h, w, columns)


def toeplitz_columns(kernel: Tensor, h: int, w: int, columns: Tensor) -> Tensor:
    """Return columns of the (O·h·w, C·h·w) matrix of a convolution (O, C, k, k) with padding k//2, from unit maps."""
    outputs, inputs, k_h, k_w = kernel.shape
    matrix = torch.empty(outputs * h * w, len(columns), dtype=torch.float64)
    for start in range(0, len(columns), _COLUMNS):  # by chunks: a convolution needs room for k² times its input
        chunk = columns[start : start + _COLUMNS]
        units = F.one_hot(chunk, inputs * h * w).double().view(-1, inputs, h, w)
        matrix[:, start : start + len(chunk)] = F.conv2d(units, kernel, padding=(k_h // 2, k_w // 2)).flatten(1).T
    return matrix


def _transposed(matrix: Tensor, area: int) -> Tensor:
    """Return a matrix (O·area, C·area) with input and output positions exchanged; of one position, its transpose."""
    if area == 1:
        return matrix.T
    cut = matrix.reshape(len(matrix) // area, area, -1, area)
    return cut.transpose(1, 3).reshape(matrix.shape)
