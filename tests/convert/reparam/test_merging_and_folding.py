import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repmlp_deploy import get_model
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches, upstream_form
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from repmlp_deploy.nets.blocks.repmlp_unit import FoldedUnit, RepMLPUnit
from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet
from support.networks import randomize


@st.composite
def units(draw: st.DrawFn) -> tuple[RepMLPUnit, torch.Tensor]:
    """A unit with any sizes and far-from-trivial BatchNorms, float64, and an input of one or several partitions."""
    S = draw(st.sampled_from([1, 2, 3]))
    C = S * draw(st.sampled_from([1, 2, 4]))
    h, w = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rows, columns = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    kernels = draw(st.sampled_from([(), (1,), (1, 3), (1, 3, 5), (7,)]))
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    block = RepMLPBlock(C, h, w, sharesets=S, kernels=kernels, hidden=max(1, C // 2))
    unit = randomize(RepMLPUnit(block, ffn_hidden=2 * C), seed).double()
    return unit, torch.randn(2, C, rows * h, columns * w, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(units())
def test_merging_and_folding_are_exact(case: tuple[RepMLPUnit, torch.Tensor]) -> None:
    """In float64 nothing but rounding is left, whatever the sizes, sharesets, kernels and partitions."""
    unit, x = case
    expected = unit(x)
    merged = merge_branches(unit)
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(upstream_form(merged)(x), expected, rtol=1e-12, atol=1e-12)
    folded = fold_affine(merged)
    torch.testing.assert_close(folded(x), expected, rtol=1e-11, atol=1e-12)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


@settings(max_examples=20, deadline=None)
@given(units())
def test_a_perturbed_weight_is_not_exact(case: tuple[RepMLPUnit, torch.Tensor]) -> None:
    """The twin of the test above: a thousandth on one entry of FC3 is a million times its tolerance."""
    unit, x = case
    merged = merge_branches(unit)
    merged.repmlp_block.fc3.weight[0] += 1e-3
    assert (merged(x) - unit(x)).abs().max() > 1e-9


def test_merging_leaves_its_input_untouched(small_network: RepMLPNet) -> None:
    before = {key: value.clone() for key, value in small_network.state_dict().items()}
    merged = merge_branches(small_network)
    merged.half()
    fold_affine(merge_branches(small_network))
    after = small_network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)


@pytest.mark.parametrize("name", ["repmlp-digits", "pure-mlp-digits"])
def test_neither_merging_nor_folding_ties_the_copy_to_its_input(name: str) -> None:
    """Another type for the copy is none for what it was made of."""
    trained = get_model(name, pretrained=True)
    merged = merge_branches(trained)
    fold_affine(merged).half()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    merged.half()
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}


def test_merging_copies_no_weight_that_it_does_not_change(small_network: RepMLPNet) -> None:
    merged = merge_branches(small_network)
    assert merged.head.weight.data_ptr() == small_network.head.weight.data_ptr()
    assert merged.head.weight is not small_network.head.weight


def test_merged_weights_are_rounded_once(small_network: RepMLPNet) -> None:
    """float32 merging is float64 merging, stored in float32."""
    name = "stages.1.0.repmlp_block.fc3.weight"
    single = merge_branches(small_network).get_parameter(name)
    double = merge_branches(small_network.double()).get_parameter(name)
    assert torch.equal(single, double.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_merge_in_their_own_type(small_network: RepMLPNet, dtype: torch.dtype) -> None:
    merged = merge_branches(small_network.to(dtype))
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}


def test_merging_refuses_training_mode_and_foreign_networks(small_network: RepMLPNet) -> None:
    small_network.stages[1][0].prebn1.train()
    with pytest.raises(ValueError, match=r"stages.1.0.prebn1 is in training mode: call .eval\(\)"):
        merge_branches(small_network)
    with pytest.raises(ValueError, match="Linear contains no RepMLP block"):
        merge_branches(nn.Linear(2, 2).eval())


def test_a_module_used_twice_is_merged_once_and_stays_shared() -> None:
    torch.manual_seed(0)
    block = randomize(RepMLPBlock(4, 3, 3, sharesets=2, hidden=2))
    merged = merge_branches(nn.Sequential(block, nn.ReLU(), block).eval())
    assert merged[0] is merged[2]
    assert merged[0].deploy


def test_folding_refuses_what_is_not_merged_and_what_no_rule_knows(small_network: RepMLPNet) -> None:
    with pytest.raises(ValueError, match="merge before folding"):
        fold_affine(small_network)
    with pytest.raises(ValueError, match="no rule folds the BatchNorm 1"):
        fold_affine(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval())


def test_a_prebn_with_vanishing_scale_folds_without_division() -> None:
    torch.manual_seed(0)
    unit = randomize(RepMLPUnit(RepMLPBlock(4, 3, 3, sharesets=2, hidden=2), ffn_hidden=8)).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for scale in (0.0, 1e-9):
        unit.prebn1.weight[1] = scale
        folded = fold_affine(merge_branches(unit))
        assert isinstance(folded, FoldedUnit)
        assert not folded.divided
        torch.testing.assert_close(folded(x), unit(x), rtol=1e-12, atol=1e-12)
