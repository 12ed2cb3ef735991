"""The algebra of maps against torch's own convolutions."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from repmlp_deploy.convert.reparam.regions.maps import (
    Map,
    composed,
    fits_zeros,
    identity,
    reads_beyond,
    scale,
    shifted_bias,
    summed,
)

C = 12


def run(made: Map, x: Tensor, pad: int = 40) -> Tensor:
    """Return the map of x on a grid that begins at its first window, over a wide border of zeros."""
    padded = F.pad(x, (pad,) * 4)
    top, left = (pad - lead for lead in made.lead)
    return F.conv2d(padded[:, :, top:, left:], made.kernel, None, made.stride, 0, made.dilation, made.groups)


@st.composite
def maps(draw: st.DrawFn, stride: int | None = None) -> Map:
    groups = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    taps = draw(st.tuples(st.integers(1, 4), st.integers(1, 3)))
    t = draw(st.integers(1, 2)) if stride is None else stride
    lead, dilation = (
        draw(st.tuples(st.integers(-1, 3), st.integers(0, 2))),
        draw(st.tuples(st.integers(1, 3), st.integers(1, 2))),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    kernel = torch.randn(C, C // groups, *taps, dtype=torch.float64, generator=generator)
    return Map(kernel, groups, (t, t), lead, dilation)


def _x() -> Tensor:
    return torch.randn(1, C, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _agree(y: Tensor, reference: Tensor) -> None:
    h, w = (min(a, b) for a, b in zip(y.shape[2:], reference.shape[2:], strict=True))
    torch.testing.assert_close(y[..., :h, :w], reference[..., :h, :w], rtol=1e-11, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(first=maps(stride=1), second=maps(stride=1))
def test_a_sum_is_the_sum_of_its_parts(first: Map, second: Map) -> None:
    both = summed(first, second)
    assert both is not None
    a, b = run(first, _x()), run(second, _x())
    h, w = (min(p, q) for p, q in zip(a.shape[2:], b.shape[2:], strict=True))
    _agree(run(both, _x()), a[..., :h, :w] + b[..., :h, :w])


@settings(max_examples=30, deadline=None)
@given(inner=maps(), outer=maps())
def test_a_composition_is_one_map_after_the_other(inner: Map, outer: Map) -> None:
    x = _x()
    padded = F.pad(x, (60,) * 4)
    first = Map(inner.kernel, inner.groups, inner.stride, (0, 0), inner.dilation)
    second = Map(outer.kernel, outer.groups, outer.stride, (0, 0), outer.dilation)
    both = composed(outer, inner)
    assert both.lead == tuple(o * t + i for o, t, i in zip(outer.lead, inner.stride, inner.lead, strict=True))
    expected = run(second, run(first, padded, pad=0), pad=0)
    _agree(run(Map(both.kernel, both.groups, both.stride, (0, 0), both.dilation), padded, pad=0), expected)


def test_maps_of_different_strides_do_not_add() -> None:
    kernel: Any = torch.ones(C, C, 1, 1, dtype=torch.float64)
    assert summed(Map(kernel, 1), Map(kernel, 1, (2, 2))) is None


def test_scales_keep_the_groups_of_what_they_scale() -> None:
    depthwise = Map(torch.ones(C, 1, 3, 3, dtype=torch.float64), C, lead=(1, 1))
    factors = torch.arange(C, dtype=torch.float64)
    assert composed(scale(factors), depthwise).groups == composed(depthwise, scale(factors)).groups == C
    assert torch.equal(composed(depthwise, scale(factors)).kernel[:, 0, 0, 0], factors)
    assert identity(C).is_identity
    assert not scale(factors).is_identity


def test_a_constant_is_summed_over_the_taps_that_read_it() -> None:
    kernel = torch.arange(4 * 2 * 3, dtype=torch.float64).reshape(4, 2, 3, 1)
    bias = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    expected = F.conv2d(bias[None, :, None, None].expand(1, 4, 3, 1), kernel, groups=2).flatten()
    assert torch.equal(shifted_bias(Map(kernel, 2), bias), expected)


def test_borders_are_read_where_windows_reach_over_them() -> None:
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    assert reads_beyond(Map(kernel, 1, lead=(1, 1)), (9, 8), (9, 8))
    assert not reads_beyond(Map(kernel, 1), (7, 6), (9, 8))
    assert reads_beyond(Map(kernel, 1), (8, 6), (9, 8))
    assert fits_zeros(identity(1), (9, 8), (9, 8))
    assert not fits_zeros(Map(kernel, 1, lead=(1, 1)), (9, 8), (9, 8))
    assert fits_zeros(Map(kernel, 1, lead=(2, 2)), (11, 10), (9, 8))
