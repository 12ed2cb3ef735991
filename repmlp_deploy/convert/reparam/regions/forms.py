"""Values as sums of maps of other values, and their composition.

    v = b + Σ_s M_s(s)

is a *form* of v: b is a constant per channel, each source s an earlier value of the graph. A value has several forms,
which differ in where they stop. Every form here is exact; a composition that would not be is no form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from repmlp_deploy.convert.reparam.regions.maps import (
    Map,
    Pair,
    composed,
    fits_zeros,
    identity,
    moved_bias,
    reads_beyond,
    summed,
    uniform,
)
from repmlp_deploy.convert.reparam.regions.reading import Affine, Overwritten, Sum, grid_of
from repmlp_deploy.convert.reparam.regions.tracing import sizes

__all__ = ["Form", "added_form", "applied_form", "itself", "overwritten_form"]


@dataclass(frozen=True, eq=False)
class Form:
    """A value in terms of others.

    Attributes:
        axis: of the channels; None if it is the only source itself.
        maps: source to map.
        bias: (O,) float64, or (O, H, W) where it differs from place to place, or None.
        covers: the nodes whose work it does.
    """

    axis: int | None
    maps: Mapping[fx.Node, Map | None]
    bias: Tensor | None = None
    covers: frozenset[fx.Node] = frozenset()

    @property
    def is_per_channel(self) -> bool:
        """Whether it is one source, scaled and shifted per channel."""
        return len(self.maps) == 1 and all(m is None or m.is_scale for m in self.maps.values())

    @property
    def trivial(self) -> bool:
        """Whether it is a source itself."""
        return len(self.maps) == 1 and self.bias is None and None in self.maps.values()


def itself(node: fx.Node) -> Form:
    """Return the form of a value in terms of itself. The map is None: a value itself has no axis of channels."""
    return Form(None, {node: None})


def applied_form(node: fx.Node, reading: Affine, form: Form) -> Form | None:
    """Return what `reading`, of `node`, makes of a form of its input; None if that is no exact form."""
    if None not in (form.axis, reading.axis) and form.axis != reading.axis:
        return None
    axis = _axis(node, form.axis, reading.axis)
    outer, grid, middle = reading.map, grid_of(node, axis), grid_of(reading.of, axis)
    if reading.axis is None:  # a single number: as many channels as there are
        outer, bias = _widened(reading, node, axis)
    else:
        bias = reading.bias
    if len(form.maps) > 1 and not outer.is_scale:
        return None  # a convolution of every source instead of one
    beyond = reads_beyond(outer, grid, middle)
    maps: dict[fx.Node, Map | None] = {}
    for source, inner in form.maps.items():
        if inner is None:
            maps[source] = outer
        elif beyond and not fits_zeros(inner, middle, grid_of(source, axis)):
            return None
        else:
            maps[source] = composed(outer, inner)
    if form.bias is not None:
        bias = _both(bias, moved_bias(outer, form.bias, grid, middle))
    return Form(axis, maps, bias, form.covers | {node})


def overwritten_form(node: fx.Node, reading: Overwritten, form: Form) -> Form | None:
    """Return a form with constants written over some places; None unless its maps are zero in these places anyway."""
    if form.axis not in (None, 1):
        return None
    for source, made in form.maps.items():
        if made is None or bool((reading.mask & _sees(made, grid_of(node, 1), grid_of(source, 1))).any()):
            return None
    bias = torch.where(reading.mask, reading.fill, _spread(form.bias, reading.fill))
    return Form(1, form.maps, uniform(bias), form.covers | {node})


def _sees(made: Map, grid: Pair, source_grid: Pair) -> Tensor:
    """Return (H, W): whether any tap of a map is on its source there."""
    axes = []
    for axis in (0, 1):
        first = torch.arange(grid[axis]) * made.stride[axis] - made.lead[axis]
        at = first[:, None] + torch.arange(made.taps[axis]) * made.dilation[axis]
        axes.append(((at >= 0) & (at < source_grid[axis])).any(1))
    return axes[0][:, None] & axes[1]


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the sum of two constants, each (O,) or (O, H, W)."""
    if first is None or second is None:
        return second if first is None else first
    if first.ndim == second.ndim == 1:
        return first + second
    return uniform(_spread(first, second) + _spread(second, first))


def _spread(bias: Tensor | None, like: Tensor) -> Tensor:
    """Return a constant as (O, 1, 1) or (O, H, W)."""
    if bias is None:
        return like.new_zeros(1, 1, 1)
    return bias[:, None, None] if bias.ndim == 1 else bias


def added_form(node: fx.Node, reading: Sum, first: Form, second: Form) -> Form | None:
    """Return the sum of two forms; None if they do not add."""
    if None not in (first.axis, second.axis) and first.axis != second.axis:
        return None
    axis = _axis(node, first.axis, second.axis)
    channels = (sizes(node) or ())[axis]
    maps = {source: _known(m, channels) for source, m in first.maps.items()}
    for source, given in second.maps.items():
        found = _known(given, channels)
        found = found if reading.sign > 0 else found.negated()
        if source in maps:
            both = summed(maps[source], found)
            if both is None:
                return None
            maps[source] = both
        else:
            maps[source] = found
    bias = _both(first.bias, None if second.bias is None else reading.sign * second.bias)
    return Form(axis, dict(maps), bias, first.covers | second.covers | {node})


def _known(given: Map | None, channels: int) -> Map:
    return identity(channels) if given is None else given


def _axis(node: fx.Node, *known: int | None) -> int:
    """Return the axis of the channels; where nothing says it, that of maps or of tokens."""
    shape = sizes(node) or ()
    return next((axis for axis in known if axis is not None), 1 if len(shape) == 4 else len(shape) - 1)  # noqa: PLR2004


def _widened(reading: Affine, node: fx.Node, axis: int) -> tuple[Map, Tensor | None]:
    channels = (sizes(node) or ())[axis]
    kernel = reading.map.kernel[:1].expand(channels, 1, 1, 1)
    bias = None if reading.bias is None else reading.bias[:1].expand(channels)
    return Map(kernel, channels), bias
