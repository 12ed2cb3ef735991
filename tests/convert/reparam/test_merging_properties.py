"""Merging and folding are exact for every shape of block, of both generations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from support.networks import randomize

EDGES = st.integers(1, 5)
PARTS = st.integers(1, 3)
KERNELS = st.lists(st.sampled_from([1, 3, 5, 7]), unique=True, max_size=3)
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}


@st.composite
def blocks_of_2022(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    S, h, w = draw(st.integers(1, 4)), draw(EDGES), draw(EDGES)
    C = S * draw(st.integers(1, 3))
    block = RepMLPBlock(C, h, w, sharesets=S, kernels=draw(KERNELS), hidden=draw(st.integers(1, 4)))
    return block, (C, h * draw(PARTS), w * draw(PARTS))


@st.composite
def blocks_of_2021(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    g, h, w = draw(st.integers(1, 3)), draw(EDGES), draw(EDGES)
    C, O = g * draw(st.integers(1, 3)), g * draw(st.integers(1, 3))  # noqa: E741 - the paper's letter
    map_size = h * draw(PARTS), w * draw(PARTS)
    kernels, reduction = draw(KERNELS), draw(st.integers(1, 4))
    block = RepMLP(C, O, map_size, (h, w), groups=g, kernels=kernels, reduction=reduction)
    return block, (C, *map_size)


BLOCKS = st.one_of(blocks_of_2022(), blocks_of_2021())


def _distance(output: torch.Tensor, reference: torch.Tensor) -> float:
    return float((output.double() - reference).abs().max() / reference.abs().max())


@given(drawn=BLOCKS, dtype=st.sampled_from(list(ROUNDING)), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_merging_a_block_keeps_its_output(drawn: tuple, dtype: torch.dtype, seed: int) -> None:
    """To the rounding of its type: the reference is the same block, its weights rounded, in float64."""
    block, shape = drawn
    torch.manual_seed(seed)
    rounded = randomize(block, seed).to(dtype)
    x = torch.randn(2, *shape).to(dtype)
    merged = merge_branches(rounded)
    assert {value.dtype for value in merged.state_dict().values()} == {dtype}
    output = merged.double()(x.double())  # arithmetic in float64: only the stored weights are rounded
    assert _distance(output, rounded.double()(x.double())) <= ROUNDING[dtype]


@given(drawn=BLOCKS, seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_folding_a_merged_block_keeps_its_output(drawn: tuple, seed: int) -> None:
    block, shape = drawn
    torch.manual_seed(seed)
    merged = merge_branches(randomize(block, seed).double())
    x = torch.randn(2, *shape, dtype=torch.float64)
    assert _distance(fold_affine(merged)(x), merged(x)) <= 1e-12


@pytest.mark.parametrize("drop", ["repconv1", "repconv3"])
def test_a_merge_without_one_branch_would_be_noticed(drop: str) -> None:
    torch.manual_seed(0)
    block = randomize(RepMLP(4, 6, (4, 6), (2, 3), groups=2, kernels=(1, 3))).double()
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    expected = block(x)
    block.kernels = tuple(k for k in block.kernels if f"repconv{k}" != drop)
    assert _distance(merge_branches(block)(x), expected) > 1e-3


def test_merging_leaves_its_input_untouched() -> None:
    block = randomize(RepMLP(4, 4, (4, 4), (2, 2)))
    before = {key: value.clone() for key, value in block.state_dict().items()}
    merge_branches(block)
    assert list(before) == list(block.state_dict())
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())
