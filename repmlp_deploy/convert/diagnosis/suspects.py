"""Suspects: for every part of a merged or folded block, what it should hold and what known faults would leave there.

With a·y + b the evaluation-mode form of a BatchNorm, a merged FC3 is a sum of terms, FC3 itself and the branches k,

    W' = Σ_i a_i M_i,      b' = Σ_i b_i,      M_3 = W_3,  M_k = T(K_k),

so a fault in one term leaves a residual that only this term explains: W − W' = −a_k T(K_k) where branch k was dropped,
+a_k T(K_k) where it came twice, (ã_k − a_k) T(K_k) where its BatchNorm was taken for something else, a_k (T̃ − T)(K_k)
where its taps lie elsewhere. Every such hypothesis predicts all entries of a matrix; one that meets them all is no
coincidence. What none explains is still named by its part and its largest element.

Expected values are computed apart from merging and folding, so that a fault of theirs is not repeated here: (a, b) by
running the BatchNorm on zeros and ones, T(K) by convolving unit maps, all in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.conv_bn import ConvBN, MergeableConvBN
from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock

__all__ = [
    "BatchNorm",
    "Check",
    "Element",
    "Finding",
    "affine_by_running",
    "conv_checks",
    "first_finding",
    "merged_checks",
    "merged_matrix",
    "parameter_checks",
    "wrong_affines",
]

BatchNorm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - torch offers no public name for 1d, 2d and 3d alike

_EPS_OF_OTHERS = (0.0, 1e-3, 1e-5, 1e-6)
_ROUNDINGS = 8.0  # units in the last place of the largest entry: above storing once, below anything that is no rounding

_COLUMNS = 128  # of a matrix, judged or made at a time

Fault = tuple[str, str, Tensor]
"""The part to blame, what went wrong there, and the value that it would give."""


@dataclass(frozen=True)
class Element:
    """The entry that is furthest off."""

    name: str
    index: tuple[int, ...]
    got: float
    expected: float

    def __str__(self) -> str:
        where = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return f"{self.name}{where} is {self.got:.6g}, expected {self.expected:.6g}"


@dataclass(frozen=True)
class Finding:
    """A part that is wrong, how, where that is known, and its worst entry."""

    part: str
    fault: str = ""
    element: Element | None = None


@dataclass(frozen=True)
class Check:
    """One stored tensor against what it should be.

    Attributes:
        part: to blame when no fault explains it.
        name: of the tensor.
        got: as stored.
        expected: float64, of the same shape.
        faults: hypotheses, tried in order.
        group: which group of the stored tensor this is, where it is one.
        columns: of `got` that `faults` predict; None for all.
        eps: of the type that `got` was rounded to; 0 for its own type's.
    """

    part: str
    name: str
    got: Tensor
    expected: Tensor
    faults: Callable[[], Iterable[Fault]] = tuple
    group: tuple[int, ...] = ()
    columns: Tensor | None = None
    eps: float = 0.0

    def distance(self, got: Tensor, value: Tensor) -> float:
        """Largest difference of `got` from `value`, in roundings of its largest entry; infinite where not finite."""
        if got.shape != value.shape:
            return math.inf
        stored = torch.finfo(got.dtype)
        unit = (self.eps or stored.eps) * max(float(value.abs().max()), stored.tiny)
        off = float((got.double() - value).abs().max()) / unit
        return off if math.isfinite(off) else math.inf

    def finding(self) -> Finding | None:
        """What is wrong; None where nothing is."""
        if self.got.shape != self.expected.shape:
            shapes = tuple(self.got.shape), tuple(self.expected.shape)
            return Finding(self.part, f"{self.name} has shape {shapes[0]}, expected {shapes[1]}")
        off = self.distance(self.got, self.expected)
        if off <= _ROUNDINGS:
            return None
        part, fault, best = self.part, "", math.inf
        got = self.got if self.columns is None else self.got[:, self.columns]
        for place, what, value in self.faults():
            distance = self.distance(got, value)
            if distance <= _ROUNDINGS and distance < min(best, off / 4):  # the first of those that explain it best
                part, fault, best = place, what, distance
        return Finding(part, fault, self._worst())

    def _worst(self) -> Element:
        error = (self.got.double() - self.expected).abs().nan_to_num(nan=math.inf)
        index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        return Element(self.name, self.group + index, float(self.got[index]), float(self.expected[index]))


def first_finding(checks: Iterable[Check]) -> Finding | None:
    """What the first check that fails says."""
    return next((found for check in checks if (found := check.finding()) is not None), None)


def affine_by_running(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """The (a, b) of BN(y) = a·y + b, each (channels,) float64, as the BatchNorm itself answers."""
    precise = copy.deepcopy(bn).double().eval()
    axes = {nn.BatchNorm1d: 0, nn.BatchNorm3d: 3}.get(type(bn), 2)
    probes = torch.tensor([0.0, 1.0], dtype=torch.float64).view(-1, *[1] * (axes + 1))
    with torch.no_grad():
        b, at_one = precise(probes.expand(-1, bn.num_features, *[-1] * axes)).flatten(1)
    return at_one - b, b


def wrong_affines(bn: BatchNorm) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a BatchNorm is taken for when something is forgotten: (fault, a, b), each (channels,) float64."""
    a, b = affine_by_running(bn)
    one = torch.ones_like(a)
    gamma = one if bn.weight is None else bn.weight.detach().double()
    beta = 0 * one if bn.bias is None else bn.bias.detach().double()
    if bn.running_mean is None or bn.running_var is None:
        return
    mean, variance = bn.running_mean.double(), bn.running_var.double()

    def with_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
        return scale, beta - mean * scale

    # those of b alone come first: where only a bias is wrong, the others would explain it too
    yield "shift dropped", a, 0 * b
    yield "shift doubled", a, 2 * b
    yield "bias forgotten", a, b - beta
    yield "mean forgotten", a, beta
    yield "mean added instead of subtracted", a, beta + mean * a
    yield "dropped", 0 * a, 0 * b
    yield "doubled", 2 * a, 2 * b
    yield "not applied", one, 0 * b
    yield "scale dropped", one, b
    yield "variance used as deviation", *with_scale(gamma / (variance + bn.eps))
    yield "variance used as deviation", *with_scale(gamma / variance)
    yield "deviation forgotten", *with_scale(gamma)
    yield "weight forgotten", *with_scale(a / gamma)
    for eps in _EPS_OF_OTHERS:
        if eps != bn.eps:
            yield f"eps {eps:g} instead of {bn.eps:g}", *with_scale(gamma / (variance + eps).sqrt())


@dataclass(frozen=True)
class _Term:
    """One addend BN(M x) of a group's merged matrix.

    Attributes:
        label: what to call it.
        bn: its BatchNorm.
        channels: (R,) which channel of it every row has.
        kernel: (O/g, C/g, k, k) float64 of a branch; None for FC3 itself.
        matrix: (R, K) float64.
    """

    label: str
    bn: BatchNorm
    channels: Tensor
    kernel: Tensor | None
    matrix: Tensor

    def scaled(self, a: Tensor) -> Tensor:
        """diag(a) M, (R, K)."""
        return a[self.channels, None] * self.matrix


def merged_matrix(block: RepMLPBlock | RepMLP, group: int) -> tuple[Tensor, Tensor]:
    """W' (R, K) and b' (R,) of one group of a trained block, float64."""
    weight, bias = _sum(_terms(block, group))
    return weight, bias


def merged_checks(block: RepMLPBlock | RepMLP, weight: Tensor, bias: Tensor, *, name: str = "fc3") -> Iterator[Check]:
    """The checks of a merged FC3: its worst group's matrix, then its worst group's bias.

    Args:
        block: trained.
        weight: (groups, R, K), as stored.
        bias: (groups, R), as stored.
        name: of the module that stores them.
    """
    expected = [merged_matrix(block, g) for g in range(len(weight))]
    for index, got, label in ((0, weight, "weight"), (1, bias, "bias")):
        values = [pair[index] for pair in expected]
        worst = max(range(len(got)), key=lambda g: _error(got[g], values[g]))
        columns = _telling_columns(weight[worst], expected[worst][0])

        def faults(g: int = worst, index: int = index, columns: Tensor = columns) -> Iterator[Fault]:
            for part, what, *pair in _merged_faults(block, g, expected[g][0], columns):
                yield part, what, pair[index]
            for other in range(len(expected)):
                if other != g:
                    value = expected[other][index] if index else expected[other][0][:, columns]
                    yield "fc3", f"shareset {g} holds what belongs to shareset {other}", value

        where = None if index else columns
        yield Check("fc3", f"{name}.{label}", got[worst], values[worst], faults, group=(worst,), columns=where)


def conv_checks(module: ConvBN | MergeableConvBN, conv: nn.Conv2d) -> Iterator[Check]:
    """The checks of a convolution that absorbed its BatchNorm."""
    if module.bn is None or conv.bias is None:
        return
    kernel = module.conv.weight.detach().double()
    before = torch.zeros(len(kernel), dtype=torch.float64) if module.conv.bias is None else module.conv.bias.double()

    def values(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a[:, None, None, None] * kernel, a * before + b

    expected = values(*affine_by_running(module.bn))
    for i, name, got in ((0, "conv.weight", conv.weight), (1, "conv.bias", conv.bias)):

        def faults(i: int = i, bn: BatchNorm = module.bn) -> Iterator[Fault]:
            for what, a, b in wrong_affines(bn):
                yield "bn fold", what, values(a, b)[i]

        yield Check("bn fold", name, got.detach(), expected[i], faults)


def parameter_checks(trained: nn.Module, candidate: nn.Module, part: str) -> Iterator[Check]:
    """The checks of parameters and buffers that should have stayed as they are."""
    theirs = candidate.state_dict()
    for name, value in trained.state_dict().items():
        if name in theirs and value.is_floating_point():
            expected = value.double()
            yield Check(part, name, theirs[name], expected, partial(_transposed, part, expected))


def _transposed(part: str, value: Tensor) -> Iterator[Fault]:
    if value.ndim > 1:
        yield part, "transposed", value.transpose(0, 1)


def _telling_columns(got: Tensor, expected: Tensor) -> Tensor:
    """Columns to judge hypotheses by: all of a small matrix; of a large one the worst, and some spread over the map."""
    count = expected.shape[1]
    if count <= _COLUMNS or got.shape != expected.shape:
        return torch.arange(count)
    error = (got.double() - expected).abs().amax(dim=0)
    worst = error.nan_to_num(nan=math.inf).topk(_COLUMNS // 2).indices
    spread = torch.linspace(0, count - 1, _COLUMNS // 2).long()
    return torch.tensor(sorted({*worst.tolist(), *spread.tolist()}))


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max().nan_to_num(nan=math.inf)) if got.shape == expected.shape else 0.0


def _terms(block: RepMLPBlock | RepMLP, group: int, columns: Tensor | None = None) -> list[_Term]:
    """FC3 and the branches, for one group and some columns of it."""
    if block.fc3_bn is None:
        raise ValueError("the block is merged already: its terms are gone")
    h, w, area = block.h, block.w, block.h * block.w
    groups = block.fc3.groups
    matrix = block.fc3.weight.detach().double().view(groups, -1, block.fc3.in_channels // groups)[group]
    outputs = len(matrix) // area  # O/g
    channels = torch.arange(outputs).repeat_interleave(area) + group * outputs
    per_row = block.fc3_bn.num_features != groups * outputs  # in 2021, fc3_bn has a channel for every row
    rows = torch.arange(len(matrix)) + group * len(matrix) if per_row else channels
    columns = torch.arange(matrix.shape[1]) if columns is None else columns
    terms = [_Term("fc3 · fc3_bn", block.fc3_bn, rows, None, matrix[:, columns])]
    for k, branch in zip(block.kernels, block.branches(), strict=True):
        kernel = branch.conv.weight.detach().double()[group * outputs : (group + 1) * outputs]
        terms.append(_Term(f"fc3 · branch repconv{k}", branch.bn, channels, kernel, _toeplitz(kernel, h, w, columns)))
    return terms


def _sum(terms: Iterable[_Term]) -> tuple[Tensor, Tensor]:
    weights, biases = [], []
    for term in terms:
        a, b = affine_by_running(term.bn)
        weights.append(term.scaled(a))
        biases.append(b[term.channels])
    return sum(weights[1:], weights[0]), sum(biases[1:], biases[0])


def _merged_faults(
    block: RepMLPBlock | RepMLP, group: int, merged: Tensor, columns: Tensor
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(part, fault, W, b) of some columns of one group, which is to be `merged`, for all that is known to go wrong."""
    terms = _terms(block, group, columns)
    branches = [term for term in terms if term.kernel is not None]
    weight, bias = _sum(terms)
    for term in terms:
        yield from _wrong_norms(term.label, [term], weight, bias)
    yield from _wrong_norms("fc3 · every BatchNorm", terms, weight, bias)
    for term in branches:
        yield from _wrong_places(term.label, [term], block, columns, weight, bias)
    yield from _wrong_places("fc3 · every branch", branches, block, columns, weight, bias)
    yield "fc3", "matrix transposed", _swapped(merged, block)[:, columns], bias


def _wrong_norms(
    label: str, terms: list[_Term], weight: Tensor, bias: Tensor
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    for wrong in zip(*(wrong_affines(term.bn) for term in terms), strict=False):
        W, b = weight, bias
        for term, (_, a_wrong, b_wrong) in zip(terms, wrong, strict=True):
            a_right, b_right = affine_by_running(term.bn)
            W, b = W + term.scaled(a_wrong - a_right), b + (b_wrong - b_right)[term.channels]
        yield label, wrong[0][0], W, b


def _wrong_places(  # noqa: PLR0913 - what is wrong, and what of
    label: str, terms: list[_Term], block: RepMLPBlock | RepMLP, columns: Tensor, weight: Tensor, bias: Tensor
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    for wrong in zip(*(_wrong_matrices(term, block, columns) for term in terms), strict=True):
        W = weight
        for term, (_, matrix) in zip(terms, wrong, strict=True):
            W = W + affine_by_running(term.bn)[0][term.channels, None] * (matrix - term.matrix)
        yield label, wrong[0][0], W, bias


def _wrong_matrices(term: _Term, block: RepMLPBlock | RepMLP, columns: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(fault, M) of a branch whose taps lie elsewhere."""
    if term.kernel is None:
        return
    h, w = block.h, block.w
    yield "Toeplitz matrix transposed", _toeplitz(term.kernel.flip(-2, -1), h, w, columns)
    yield "kernel transposed", _toeplitz(term.kernel.transpose(-2, -1), h, w, columns)
    yield "h and w swapped", _toeplitz(term.kernel, w, h, columns)
    padded = F.pad(term.kernel, (1, 1, 1, 1))
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            if dy or dx:
                yield "padding off by one", _toeplitz(padded.roll((dy, dx), dims=(-2, -1)), h, w, columns)


def _toeplitz(kernel: Tensor, h: int, w: int, columns: Tensor) -> Tensor:
    """Columns of the (O·h·w, C·h·w) matrix of a convolution (O, C, k, k) with padding k//2: it convolves unit maps."""
    outputs, inputs, k_h, k_w = kernel.shape
    matrix = torch.empty(outputs * h * w, len(columns), dtype=torch.float64)
    for start in range(0, len(columns), _COLUMNS):  # by chunks: a convolution needs room for k² times its input
        chunk = columns[start : start + _COLUMNS]
        units = F.one_hot(chunk, inputs * h * w).double().view(-1, inputs, h, w)
        matrix[:, start : start + len(chunk)] = F.conv2d(units, kernel, padding=(k_h // 2, k_w // 2)).flatten(1).T
    return matrix


def _swapped(matrix: Tensor, block: RepMLPBlock | RepMLP) -> Tensor:
    """A matrix (O·h·w, C·h·w) with input and output positions exchanged."""
    area = block.h * block.w
    cut = matrix.reshape(len(matrix) // area, area, -1, area)
    return cut.transpose(1, 3).reshape(matrix.shape)
