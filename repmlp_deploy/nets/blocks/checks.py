"""Checks: what a stored tensor should hold, and what known faults would leave there.

Expected values are computed apart from merging and folding, so that their faults are not repeated here: (a, b) of a
BatchNorm by running it on zeros and ones, everything in float64. A fault is a hypothesis that predicts every entry of a
tensor; a hypothesis that meets them all is no coincidence. If none does, the check still names the part and its largest
error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from repmlp_deploy.nets.blocks.algebra import BatchNorm

__all__ = [
    "Check",
    "Element",
    "Fault",
    "Finding",
    "absorbed_checks",
    "affine_by_running",
    "first_finding",
    "fused_checks",
    "parameter_checks",
    "wrong_affines",
]

_EPS_OF_OTHERS = (0.0, 1e-3, 1e-5, 1e-6)
_ROUNDINGS = 8.0  # units in the last place of the largest entry: above storing once, below anything that is no rounding

Fault = tuple[str, str, Tensor]
"""The part to blame, what went wrong there, and the values that the fault would store."""


@dataclass(frozen=True)
class Element:
    """The entry with the largest error."""

    name: str
    index: tuple[int, ...]
    got: float
    expected: float

    def __str__(self) -> str:
        where = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return f"{self.name}{where} is {self.got:.6g}, expected {self.expected:.6g}"


@dataclass(frozen=True)
class Finding:
    """A part that is wrong, the fault if it is known, and the entry with the largest error."""

    part: str
    fault: str = ""
    element: Element | None = None


@dataclass(frozen=True)
class Check:
    """One stored tensor, and what it should hold.

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
        """Return the largest difference of `got` from `value`, in roundings of its largest entry."""
        if got.shape != value.shape:
            return math.inf
        stored = torch.finfo(got.dtype)
        unit = (self.eps or stored.eps) * max(float(value.abs().max()), stored.tiny)
        off = float((got.double() - value).abs().max()) / unit
        return off if math.isfinite(off) else math.inf

    def finding(self) -> Finding | None:
        """Return what is wrong; None where nothing is."""
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
    """Return the finding of the first check that fails."""
    return next((found for check in checks if (found := check.finding()) is not None), None)


def affine_by_running(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the (a, b) of BN(y) = a·y + b, each (channels,) float64, by running the BatchNorm."""
    precise = copy.deepcopy(bn).double().eval()
    axes = {nn.BatchNorm1d: 0, nn.BatchNorm3d: 3}.get(type(bn), 2)
    probes = torch.tensor([0.0, 1.0], dtype=torch.float64).view(-1, *[1] * (axes + 1))
    with torch.no_grad():
        b, at_one = precise(probes.expand(-1, bn.num_features, *[-1] * axes)).flatten(1)
    return at_one - b, b


def wrong_affines(bn: BatchNorm) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (fault, a, b) for every known mistake in reading a BatchNorm, each (channels,) float64."""
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


def absorbed_checks(
    part: str,
    bn: BatchNorm,
    values: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    stored: list[tuple[str, Tensor]],
) -> Iterator[Check]:
    """Yield the checks of tensors that absorbed `bn`; `values` computes what they should hold from (a, b)."""
    expected = values(*affine_by_running(bn))
    for i, (name, got) in enumerate(stored):

        def faults(i: int = i) -> Iterator[Fault]:
            for what, a, b in wrong_affines(bn):
                yield part, what, values(a, b)[i]

        yield Check(part, name, got.detach(), expected[i], faults)


def fused_checks(conv: nn.Conv2d, bn: BatchNorm | None, fused: nn.Conv2d) -> Iterator[Check]:
    """Yield the checks of `fused`, a convolution that absorbed the BatchNorm after `conv`."""
    if bn is None or fused.bias is None:
        return
    kernel = conv.weight.detach().double()
    before = torch.zeros(len(kernel), dtype=torch.float64) if conv.bias is None else conv.bias.detach().double()

    def values(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a[:, None, None, None] * kernel, a * before + b

    yield from absorbed_checks("bn fold", bn, values, [("conv.weight", fused.weight), ("conv.bias", fused.bias)])


def parameter_checks(trained: nn.Module, candidate: nn.Module, part: str) -> Iterator[Check]:
    """Yield the checks of parameters and buffers that should be unchanged."""
    theirs = candidate.state_dict()
    for name, value in trained.state_dict().items():
        if name in theirs and value.is_floating_point():
            expected = value.double()
            yield Check(part, name, theirs[name], expected, partial(_transposed, part, expected))


def _transposed(part: str, value: Tensor) -> Iterator[Fault]:
    if value.ndim > 1:
        yield part, "transposed", value.transpose(0, 1)
