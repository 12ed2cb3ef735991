"""The algebra apart from rounding: what float64 must leave, and what each comparison must notice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from repmlp_deploy import get_model
from repmlp_deploy.bundle import Hop
from repmlp_deploy.convert.proof.algebra import Transformation, compare_weights, prove_algebra, redraw_statistics
from repmlp_deploy.convert.proof.certificate import Certifier
from repmlp_deploy.convert.proof.probe import probe_inputs, record_probe, run_network
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.errors import VerificationError
from repmlp_deploy.nets.networks.repmlpnet import RepMLPNet, RepMLPNetSpec
from repmlp_deploy.nets.surgery import in_double
from support.networks import randomize

Transform = Callable[[nn.Module], nn.Module]


def certifier_of(network: nn.Module) -> Certifier:
    return Certifier(record_probe(network, probe_inputs((3, 16, 24))), (1, 3))


def prove(network: nn.Module, merge: Transform = merge_branches, fold: Transform = fold_affine) -> list[Hop]:
    """The lines of both steps, as the pipeline makes them."""
    certifier = certifier_of(network)
    merged = merge(network)
    hops = certifier.require("merged", lambda x: run_network(merged, x))
    folded = fold(merged)
    hops += certifier.require("folded", lambda x: run_network(folded, x))
    steps = [Transformation("merged", merge, merged), Transformation("folded", fold, folded)]
    return [*certifier.floor_rows(), *hops, *prove_algebra(network, steps, certifier)]


@pytest.fixture
def trivial_network() -> RepMLPNet:
    """Every BatchNorm as it is born: merging is nearly the identity."""
    torch.manual_seed(0)
    spec = RepMLPNetSpec(input_size=(16, 24), channels=(8, 16), depths=(1, 1), sharesets=(2, 4), classes=7)
    return RepMLPNet(spec).eval().requires_grad_(requires_grad=False)


def test_float64_leaves_nothing_but_its_own_rounding(small_network: RepMLPNet) -> None:
    hops = {hop.name: hop for hop in prove(small_network)}
    for step in ("merged", "folded"):
        for how in ("float64", "redrawn"):
            hop = hops[f"{step}, {how}"]
            assert hop.passed
            assert hop.max_rel < 1e-12
            assert hop.margin is None or hop.margin > 50
        weights = hops[f"{step} weights"]
        assert weights.passed
        assert weights.ratio is not None
        assert 0 < weights.ratio < 4


def perturbed(transform: Transform, key: str) -> Transform:
    """`transform`, and one weight of its result a thousandth of its row's largest off."""

    def mutant(network: nn.Module) -> nn.Module:
        result = transform(network)
        row = result.get_parameter(key).detach().reshape(-1, result.get_parameter(key).shape[-1])[-1]
        row[0] += 1e-3 * row.abs().max()
        return result

    return mutant


@pytest.mark.parametrize(
    ("step", "key"),
    [
        ("merged", "stages.1.0.repmlp_block.fc3.bias"),
        ("merged", "stages.0.0.repmlp_block.fc3.weight"),
        ("folded", "stages.1.1.fc3"),
        ("folded", "stages.0.0.gp.fc1.weight"),
        ("folded", "head.weight"),
    ],
)
def test_one_weight_off_by_a_thousandth_is_named(small_network: RepMLPNet, step: str, key: str) -> None:
    transform = merge_branches if step == "merged" else fold_affine
    before = small_network if step == "merged" else merge_branches(small_network)
    stored = perturbed(transform, key)(copy.deepcopy(before))
    precise = transform(copy.deepcopy(before).double())
    hop = compare_weights(f"{step} weights", stored, precise)
    assert not hop.passed
    assert hop.note.startswith(f"farthest: {key}, row ")
    assert hop.ratio is not None
    assert hop.ratio > 1000
    assert compare_weights(step, transform(copy.deepcopy(before)), precise).passed


def test_an_error_below_float32s_noise_is_above_float64s(small_network: RepMLPNet) -> None:
    """A millionth on one bias passes as rounding in float32, and in float64 does not."""

    def nudged(network: nn.Module) -> nn.Module:
        merged = merge_branches(network)
        merged.stages[0][0].repmlp_block.fc3.bias[0] *= 1 + 1e-6
        return merged

    with pytest.raises(VerificationError, match=r"merged, float64 at batch 1 differs from the trained network by"):
        prove(small_network, merge=nudged)


def test_merging_in_float32_is_no_algebra(small_network: RepMLPNet) -> None:
    """The row of float64 fails what the row of float32 passes."""

    def single(network: nn.Module) -> nn.Module:
        return merge_branches(copy.deepcopy(network).float()).to(next(network.parameters()).dtype)

    with pytest.raises(VerificationError, match=r"fp64 allows .*: nothing was written"):
        prove(small_network, merge=single)


def without_means(network: nn.Module) -> nn.Module:
    """A merge that forgets the running means of FC3's BatchNorms."""
    forgetful = copy.deepcopy(network)
    for name, module in forgetful.named_modules():
        if name.endswith("fc3_bn"):
            module.running_mean.zero_()
    return merge_branches(forgetful)


def with_variance_as_deviation(network: nn.Module) -> nn.Module:
    """A merge that takes variances for deviations."""
    forgetful = copy.deepcopy(network)
    for name, module in forgetful.named_modules():
        if name.endswith("fc3_bn"):
            module.running_var.pow_(2)
    return merge_branches(forgetful)


def without_prebn_shift(network: nn.Module) -> nn.Module:
    """A fold that drops the shift of prebn2."""
    forgetful = copy.deepcopy(network)
    for name, module in forgetful.named_modules():
        if name.endswith("prebn2"):
            module.bias.copy_(module.running_mean * module.weight / torch.sqrt(module.running_var + module.eps))
    return fold_affine(forgetful)


@pytest.mark.parametrize(
    ("merge", "fold", "said"),
    [
        (without_means, fold_affine, "merged, redrawn"),
        (with_variance_as_deviation, fold_affine, "merged, "),
        (merge_branches, without_prebn_shift, "folded, redrawn"),
    ],
)
def test_trivial_statistics_cannot_hide_a_fault(
    trivial_network: RepMLPNet, merge: Transform, fold: Transform, said: str
) -> None:
    """The faults change nothing, or next to nothing, where mean and bias are 0 and the variance is 1."""
    certifier_of(trivial_network).require("merged", lambda x: run_network(merge(trivial_network), x))
    with pytest.raises(VerificationError, match=said):
        prove(trivial_network, merge, fold)


def test_redrawing_is_seeded_and_what_it_returns_is_the_new_network(small_network: RepMLPNet) -> None:
    x = probe_inputs((3, 16, 24)).astype(np.float64)
    first, second = copy.deepcopy(small_network).double(), copy.deepcopy(small_network).double()
    outputs = redraw_statistics(first, [x])
    assert np.array_equal(outputs[0], redraw_statistics(second, [x])[0])
    assert np.array_equal(outputs[0], run_network(first, x)[0])  # no hook is left to draw again
    for name, value in small_network.double().named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert not torch.isclose(first.get_buffer(name), value, rtol=1e-3).any()


def test_a_batch_norm_that_is_used_twice_is_drawn_once() -> None:
    bn = nn.BatchNorm2d(4).eval().double()
    network = nn.Sequential(bn, nn.ReLU(), bn).eval()
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 3))
    outputs = redraw_statistics(network, [x])
    assert np.array_equal(outputs[0], run_network(network, x)[0])


@pytest.mark.parametrize("shared", [("weight", "bias"), ("running_mean", "running_var")])
def test_what_batch_norms_share_is_drawn_once(shared: tuple[str, str]) -> None:
    """A second drawing would change what the first BatchNorm has computed with."""
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    for name in shared:
        setattr(second, name, getattr(first, name))
    network = in_double(nn.Sequential(first, nn.ReLU(), second).eval())
    second = network[2]
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 3))
    outputs = redraw_statistics(network, [x])
    assert np.array_equal(outputs[0], run_network(network, x)[0])
    assert not torch.equal(second.weight, torch.ones(4))
    assert not torch.equal(second.running_var, torch.ones(4))


def test_what_another_module_shares_with_a_batch_norm_is_not_drawn() -> None:
    norm, scale = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
    norm.weight = scale.weight
    network = nn.Sequential(scale, norm).eval().double().requires_grad_(requires_grad=False)
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 3))
    assert np.array_equal(redraw_statistics(network, [x])[0], run_network(network, x)[0])


def test_what_keeps_no_statistics_is_left_alone() -> None:
    bn = nn.BatchNorm2d(4, track_running_stats=False).eval().double()
    before = bn.weight.clone()
    redraw_statistics(bn, [np.ones((2, 4, 3, 3))])
    assert torch.equal(bn.weight, before)


def test_other_weights_are_no_comparison(small_network: RepMLPNet) -> None:
    merged = merge_branches(small_network)
    with pytest.raises(VerificationError, match="is a weight of the float32 network or of its float64 twin, not of"):
        compare_weights("folded weights", merged, fold_affine(merged).double())
    other = merge_branches(small_network)
    other.head.weight = nn.Parameter(other.head.weight[:3])
    with pytest.raises(VerificationError, match=r"head.weight has shape \(3, 16\); in float64 \(7, 16\)"):
        compare_weights("merged weights", other, merged.double())


def masked(*values: float) -> nn.Module:
    """A module with a mask as attention has it."""
    module = nn.Module()
    module.register_buffer("mask", torch.tensor([[0.0, *values], [0.0, 1.0, 2.0]]))
    return module


def test_what_is_infinite_in_both_is_equal() -> None:
    hop = compare_weights("folded weights", masked(-torch.inf, torch.inf), masked(-torch.inf, torch.inf).double())
    assert hop.passed
    assert hop.max_abs == 0
    for wrong in ((-torch.inf, -torch.inf), (-torch.inf, 1e30), (torch.nan, torch.inf)):
        with pytest.raises(VerificationError, match="values that are not finite"):
            compare_weights("folded weights", masked(*wrong), masked(-torch.inf, torch.inf).double())
    near = compare_weights("folded weights", masked(-torch.inf, 1.001), masked(-torch.inf, 1.0).double())
    assert not near.passed


@pytest.mark.slow
def test_at_full_size_one_weight_off_by_a_thousandth_is_below_the_noise_and_still_named() -> None:
    """The twin within: the outputs pass, at every batch size."""
    network = randomize(get_model("repmlpnet-t224"))
    merged = merge_branches(network)
    merged.stages[2][3].repmlp_block.fc3.weight.view(-1)[12345] += 1e-3
    certifier = Certifier(record_probe(network, probe_inputs((3, 224, 224))), (1, 3))
    certifier.require("merged", lambda x: run_network(merged, x))
    hop = compare_weights("merged weights", merged, merge_branches(copy.deepcopy(network).double()))
    assert not hop.passed
    assert hop.note.startswith("farthest: stages.2.3.repmlp_block.fc3.weight, row ")
