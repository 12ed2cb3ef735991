"""Shift-invariant linear maps, and how they add and compose. Float64 throughout.

A map takes a source s of C channels to

    v[o, i] = Σ_{c,a} W[o, c, a] · s₀[c, i·t − l + a·d],

for each of two axes: t is the stride, l the leading padding, d the dilation, and s₀ is s with zeros around it. The
positions i run over the grid of v, which the map itself does not know. A linear layer over channels is the case of one
tap. The channels are in `groups` blocks, as torch has them.

**Sum.** Two maps of one stride add on a common lattice: l = max(l₁, l₂), d = gcd(d₁, d₂, |l₁ − l₂|), and blocks of
channels that both of them respect, gcd(g₁, g₂).

**Composition** Q∘P: t = t_Q t_P, l = l_Q t_P + l_P, and W[a·d_Q·t_P + b·d_P] += W_Q[a] W_P[b]. It is exact where
Q reads of P's values only what is on P's grid, or where P's formula gives zero beyond it, as Q assumes: `fits_zeros`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own custom

__all__ = [
    "Map",
    "Pair",
    "composed",
    "fits_zeros",
    "identity",
    "moved_bias",
    "reads_beyond",
    "scale",
    "shifted_bias",
    "summed",
    "uniform",
]

Pair = tuple[int, int]

_ROUNDING = 1e-13  # relative: a few dozen products in float64


@dataclass(frozen=True, eq=False)
class Map:
    """A shift-invariant linear map; the letters are those of this module's docstring.

    Attributes:
        kernel: W (O, C/groups, kh, kw), float64.
        groups: blocks of channels.
        stride: t.
        lead: l, the padding before the first row and column.
        dilation: d; means nothing along an axis of one tap.
    """

    kernel: Tensor
    groups: int
    stride: Pair = (1, 1)
    lead: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def taps(self) -> Pair:
        """(kh, kw)."""
        return self.kernel.shape[2], self.kernel.shape[3]

    @property
    def outputs(self) -> int:
        """O."""
        return self.kernel.shape[0]

    @property
    def inputs(self) -> int:
        """C."""
        return self.kernel.shape[1] * self.groups

    @property
    def is_pointwise(self) -> bool:
        """Whether every position depends on itself alone."""
        return (self.taps, self.stride, self.lead) == ((1, 1), (1, 1), (0, 0))

    @property
    def is_scale(self) -> bool:
        """Whether it multiplies every channel by a number."""
        return self.is_pointwise and self.groups == self.inputs == self.outputs

    @property
    def is_identity(self) -> bool:
        """Whether it is a scale by ones."""
        return self.is_scale and bool((self.kernel == 1).all())

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds per position of the result."""
        return self.kernel.numel()

    def negated(self) -> Map:
        """Return −1 times this map."""
        return replace(self, kernel=-self.kernel)


def identity(channels: int) -> Map:
    """Return the map that changes nothing."""
    return scale(torch.ones(channels, dtype=torch.float64))


def scale(factors: Tensor) -> Map:
    """Return the map that multiplies channel c by factors[c]; factors is (C,)."""
    return Map(factors.reshape(-1, 1, 1, 1), len(factors))


def summed(first: Map, second: Map) -> Map | None:
    """Return the sum of two maps of one source; None if their strides differ."""
    if first.stride != second.stride:
        return None
    groups = math.gcd(first.groups, second.groups)
    lead = _each(max, first.lead, second.lead)
    dilation, taps = [], []
    for axis in (0, 1):
        steps = [part.dilation[axis] for part in (first, second) if part.taps[axis] > 1]
        step = math.gcd(*steps, abs(first.lead[axis] - second.lead[axis])) or 1
        last = max(part.dilation[axis] * (part.taps[axis] - 1) - part.lead[axis] for part in (first, second))
        dilation.append(step)
        taps.append((last + lead[axis]) // step + 1)
    kernel = first.kernel.new_zeros(first.outputs, first.inputs // groups, *taps)
    for part in (first, second):
        rows, columns = (
            [
                (lead[axis] - part.lead[axis] + tap * part.dilation[axis]) // dilation[axis]
                for tap in range(part.taps[axis])
            ]
            for axis in (0, 1)
        )
        kernel[:, :, torch.tensor(rows)[:, None], torch.tensor(columns)] += _regrouped(part, groups)
    return Map(kernel, groups, first.stride, lead, (dilation[0], dilation[1]))


def composed(outer: Map, inner: Map) -> Map:
    """Return outer∘inner, as if the inner map's formula held everywhere; see `fits_zeros` and `reads_beyond`."""
    if outer.is_scale:
        return replace(inner, kernel=inner.kernel * outer.kernel)
    if inner.is_scale:
        return replace(outer, kernel=outer.kernel * _per_input(inner.kernel.flatten(), outer))
    groups = math.gcd(outer.groups, inner.groups)
    spread = _each(lambda a, b: a * b, outer.dilation, inner.stride)
    dilation, taps = [], []
    for axis in (0, 1):
        steps = [d for d, k in ((spread[axis], outer.taps[axis]), (inner.dilation[axis], inner.taps[axis])) if k > 1]
        step = math.gcd(*steps) or 1
        reach = spread[axis] * (outer.taps[axis] - 1) + inner.dilation[axis] * (inner.taps[axis] - 1)
        dilation.append(step)
        taps.append(reach // step + 1)
    q = _blocks(_regrouped(outer, groups), groups)  # (g, O/g, M/g, kh, kw)
    p = _blocks(_regrouped(inner, groups), groups)  # (g, M/g, C/g, kh, kw)
    kernel = q.new_zeros(groups, q.shape[1], p.shape[2], *taps)
    rows, columns = (torch.arange(inner.taps[a]) * inner.dilation[a] // dilation[a] for a in (0, 1))
    for y in range(outer.taps[0]):
        for x in range(outer.taps[1]):
            part = torch.einsum("gom,gmchw->gochw", q[..., y, x], p)
            at = (rows + y * spread[0] // dilation[0])[:, None], columns + x * spread[1] // dilation[1]
            kernel[..., at[0], at[1]] += part
    return Map(
        kernel.flatten(0, 1),
        groups,
        _each(lambda a, b: a * b, outer.stride, inner.stride),
        _each(lambda a, b: a + b, _each(lambda a, b: a * b, outer.lead, inner.stride), inner.lead),
        (dilation[0], dilation[1]),
    )


def shifted_bias(outer: Map, bias: Tensor) -> Tensor:
    """Return what a constant per channel (C,) becomes, (O,), where every tap reads it."""
    return (outer.kernel * _per_input(bias, outer)).sum((1, 2, 3))


def moved_bias(outer: Map, bias: Tensor, grid: Pair, inner_grid: Pair) -> Tensor:
    """Return what a constant, (C,) or (C, H, W), becomes on `grid` where zeros are around it: (O,) if that will do."""
    if bias.ndim == 1 and not reads_beyond(outer, grid, inner_grid):
        return shifted_bias(outer, bias)
    c, (h, w) = len(bias), inner_grid
    value = bias.reshape(1, c, *bias.shape[1:] or (1, 1)).expand(1, c, h, w)
    reach = [(grid[a] - 1) * outer.stride[a] + outer.dilation[a] * (outer.taps[a] - 1) + 1 for a in (0, 1)]
    trail = [reach[a] - outer.lead[a] - inner_grid[a] for a in (0, 1)]
    value = F.pad(value, (outer.lead[1], trail[1], outer.lead[0], trail[0]))
    return uniform(F.conv2d(value, outer.kernel, None, outer.stride, 0, outer.dilation, outer.groups)[0])


def uniform(bias: Tensor) -> Tensor:
    """Return a constant (O, H, W) as (O,) if it is the same in all places, up to float64's rounding."""
    first = bias[:, :1, :1]
    alike = (bias - first).abs().amax((1, 2)) <= _ROUNDING * bias.abs().amax((1, 2))
    return first[:, 0, 0].clone() if bool(alike.all()) else bias


def reads_beyond(outer: Map, grid: Pair, inner_grid: Pair) -> bool:
    """Return whether a map with results on `grid` reads beyond a source on `inner_grid`."""
    return any(
        outer.lead[axis] > 0
        or (grid[axis] - 1) * outer.stride[axis] - outer.lead[axis] + (outer.taps[axis] - 1) * outer.dilation[axis]
        >= inner_grid[axis]
        for axis in (0, 1)
    )


def fits_zeros(inner: Map, grid: Pair, source_grid: Pair) -> bool:
    """Return whether windows beyond the grid of a map's results miss its source, which makes them zero."""
    return all(
        -inner.stride[axis] - inner.lead[axis] + (inner.taps[axis] - 1) * inner.dilation[axis] < 0
        and grid[axis] * inner.stride[axis] - inner.lead[axis] >= source_grid[axis]
        for axis in (0, 1)
    )


def _each(function: Callable[[int, int], int], first: Pair, second: Pair) -> Pair:
    return function(first[0], second[0]), function(first[1], second[1])


def _per_input(values: Tensor, outer: Map) -> Tensor:
    """Return (O, C/g, 1, 1): the value of the input channel that every weight of `outer` multiplies."""
    rows = values.reshape(outer.groups, -1).repeat_interleave(outer.outputs // outer.groups, 0)
    return rows[:, :, None, None]


def _blocks(kernel: Tensor, groups: int) -> Tensor:
    """Return the kernel by blocks: (O, C/g, kh, kw) -> (g, O/g, C/g, kh, kw)."""
    return kernel.reshape(groups, -1, *kernel.shape[1:])


def _regrouped(part: Map, groups: int) -> Tensor:
    """Return the kernel over fewer, larger blocks of channels: (O, C/groups, kh, kw)."""
    if groups == part.groups:
        return part.kernel
    many = part.groups // groups
    o, c = part.outputs // part.groups, part.kernel.shape[1]
    blocks = part.kernel.new_zeros(groups, many, o, many, c, *part.taps)
    each = torch.arange(many)
    blocks[:, each, :, each] = part.kernel.reshape(groups, many, o, c, *part.taps).transpose(0, 1)
    return blocks.reshape(part.outputs, many * c, *part.taps)
