"""Blame: none where networks agree, the right place where they do not, and never an error of its own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from repmlp_deploy.convert.diagnosis.blame import Blame, blame_network, blamed, describe_blame
from repmlp_deploy.convert.diagnosis.places import place_of
from repmlp_deploy.convert.proof.probe import probe_inputs
from repmlp_deploy.convert.reparam.fold import fold_affine
from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.convert.source.own_network import describe_interface
from repmlp_deploy.errors import VerificationError
from repmlp_deploy.nets.blocks.algebra import affine_of_batch_norm
from repmlp_deploy.nets.blocks.checks import Check, Element, affine_by_running, wrong_affines
from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from repmlp_deploy.nets.blocks.terms import merged_matrix
from repmlp_deploy.nets.networks.pure_mlp import PureMLP, PureMLPSpec
from repmlp_deploy.nets.networks.repmlp_resnet import RepMLPResNet, RepMLPResNetSpec
from support.networks import randomize
from support.own_networks import Segmenter
from support.task_cases import small_network


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pure_mlp() -> nn.Module:
    spec = PureMLPSpec(
        input_size=(8, 12), channels=(4, 8), depths=(1, 2), partitions=((4, 6), (2, 3)), groups=(2, 4), classes=5
    )
    torch.manual_seed(0)
    return randomize(PureMLP(spec))


def resnet() -> nn.Module:
    spec = RepMLPResNetSpec(
        input_size=(32, 32),
        block="bottleneck",
        depths=(1, 2, 2, 1),
        channels=(16, 32, 64, 64),
        stem=8,
        partition=(2, 2),
        groups=2,
        kernels=(1, 3),
        squeeze=(2, 2),
        classes=5,
    )
    torch.manual_seed(0)
    return randomize(RepMLPResNet(spec))


NETWORKS = {
    "repmlpnet": lambda: small_network("repmlpnet", input_size=(16, 24)),
    "repmlpnet-backbone": lambda: small_network("repmlpnet-backbone"),
    "pspnet": lambda: small_network("pspnet"),
    "mobilefacenet": lambda: small_network("mobilefacenet"),
    "pure-mlp": pure_mlp,
    "repmlp-resnet": resnet,
}
SIZES = {"repmlpnet": (16, 24), "pure-mlp": (8, 12)}
PLACES = {
    "repmlpnet": ("stages.1.1.ffn_block.ffn_fc2.bn.bias", "stages.1.1", "ffn_fc2 · bn fold"),
    "repmlpnet-backbone": ("head_norm.bias", "head_norm", "norm fold"),
    "pspnet": ("head.bottleneck.bn.bias", "head", "bottleneck · bn fold"),
    "mobilefacenet": ("stages.1.units.1.repmlp_block.repconv3.bn.bias", "stages.1.units.1", "fc3 · branch repconv3"),
    "pure-mlp": ("stages.1.1.repmlp.repconv3.bn.bias", "stages.1.1", "fc3 · branch repconv3"),
    "repmlp-resnet": ("stage3.1.btnk_repmlp.fc3_bn.bias", "stage3.1", "btnk_repmlp · fc3 · fc3_bn"),
}
"""A weight to forget in training's stead, and where that is to be found."""


@pytest.mark.parametrize("family", NETWORKS)
def test_every_family_is_blameless_and_then_blamed_rightly(family: str) -> None:
    """What forgets one bias, merged and folded, is blamed there; the rest of the chain is right."""
    network = NETWORKS[family]()
    inputs = [probe_inputs((3, *SIZES.get(family, (32, 32))))]
    merged = merge_branches(network)
    assert blame_network(network, merged, inputs) is None
    assert blame_network(network, fold_affine(merged), inputs) is None
    key, block, part = PLACES[family]
    forgetful = copy.deepcopy(network)
    forgetful.get_parameter(key).data.zero_()
    for made in (merge_branches(forgetful), fold_affine(merge_branches(forgetful))):
        blame = blame_network(network, made, inputs)
        assert blame is not None
        assert blame.block == block
        assert blame.error > 8 * blame.floor
    if family == "repmlpnet":  # its units are folded as a whole
        assert (blame.part, blame.fault) == (part, "bias forgotten")
    elif "fold" in part:
        assert blame.part == part
    else:
        blame = blame_network(network, merge_branches(forgetful), inputs)
        assert (blame.part, blame.fault) == (part, "bias forgotten")


def test_a_network_of_ones_own_with_foreign_blocks() -> None:
    torch.manual_seed(0)
    network = randomize(Segmenter())
    example = {"images": torch.randn(1, 3, 32, 32), "weight": torch.rand(1, 5)}
    called, _ = describe_interface(network, example)
    inputs = [probe_inputs((3, 32, 32)), np.random.default_rng(0).random((3, 5), np.float32)]
    merged = merge_branches(called)
    assert blame_network(called, merged, inputs) is None
    assert blame_network(called, fold_affine(merged, keep_unknown=True), inputs) is None
    forgetful = copy.deepcopy(called)
    forgetful.module.two.repconv3.bn.bias.data.zero_()
    blame = blame_network(called, merge_branches(forgetful), inputs)
    assert (blame.place, blame.fault) == ("two · fc3 · branch repconv3", "bias forgotten")
    forgetful = copy.deepcopy(called)
    forgetful.module.auxiliary.bias.data[3] += 1e-3
    blame = blame_network(called, merge_branches(forgetful), inputs)
    assert (blame.place, blame.element.index) == ("auxiliary", (3,))


class Levels(NamedTuple):
    fine: torch.Tensor
    coarse: torch.Tensor


class Neck(nn.Module):
    """Takes its tensors in one value, and changes the first of them in place."""

    def __init__(self, *, named: bool) -> None:
        super().__init__()
        self.named = named
        self.mix = RepMLPBlock(8, 8, 8, sharesets=4, hidden=4)

    def forward(self, levels: Any, *, weights: Any) -> torch.Tensor:
        levels = levels.values() if isinstance(levels, dict) else levels
        fine, coarse = (levels.fine, levels.coarse) if self.named else levels
        fine += weights[0]["fine"]
        return self.mix(fine + nn.functional.interpolate(coarse, scale_factor=2.0))


class Pyramid(nn.Module):
    """Levels that pass between its modules as a `kind`."""

    def __init__(self, kind: Callable[..., object]) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.neck = Neck(named=kind is Levels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.stem(x)
        return self.neck(self.kind(fine, nn.functional.avg_pool2d(fine, 2)), weights=[{"fine": fine.mean()}])


@pytest.mark.parametrize(
    "kind",
    [
        lambda *levels: list(levels),
        lambda *levels: dict(zip("ab", levels, strict=True)),
        lambda *levels: OrderedDict(zip("ab", levels, strict=True)),
        lambda *levels: levels,
        Levels,
    ],
    ids=["list", "dict", "OrderedDict", "tuple", "named tuple"],
)
def test_modules_that_take_their_tensors_together_are_blamed_like_others(kind: Callable[..., object]) -> None:
    torch.manual_seed(0)
    network, inputs = randomize(Pyramid(kind)), [probe_inputs((3, 16, 16))]
    assert blame_network(network, merge_branches(network), inputs) is None
    forgetful = copy.deepcopy(network)
    forgetful.neck.mix.repconv3.bn.bias.data.zero_()
    blame = blame_network(network, merge_branches(forgetful), inputs)
    assert (blame.place, blame.fault) == ("neck · mix · fc3 · branch repconv3", "bias forgotten")


def test_what_a_container_does_itself_is_blamed_on_it() -> None:
    """Every part answers as it should; only what is done with the answers differs."""

    class Forgetful(RepMLPBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1e-3

    network = small_network("repmlpnet")
    merged = merge_branches(network)
    merged.stages[1][0].repmlp_block.__class__ = Forgetful
    blame = blame_network(network, merged, [probe_inputs((3, 32, 32))])
    assert (blame.block, blame.part) == ("stages.1.0", "forward")
    assert "what it does with them is not" in blame.fault


def test_an_answer_of_another_shape_or_no_answer_is_blamed() -> None:
    network = small_network("repmlpnet")
    merged = merge_branches(network)
    merged.stages[0][0].ffn_block.ffn_fc1.conv = nn.Conv2d(8, 32, 3).eval()
    blame = blame_network(network, merged, [probe_inputs((3, 32, 32))])
    assert blame.place == "stages.0.0 · ffn_block · ffn_fc1 · conv"
    assert blame.fault == "weight has shape (32, 8, 3, 3), expected (32, 8, 1, 1)"
    merged = merge_branches(network)
    merged.stages[0][0].ffn_block.ffn_fc1.conv.stride = (2, 2)
    blame = blame_network(network, merged, [probe_inputs((3, 32, 32))])
    assert blame.fault == "output has shape (3, 32, 4, 4); the reference has (3, 32, 8, 8)"
    merged.stages[0][0].ffn_block.ffn_fc1.conv.groups = 3
    assert blame_network(network, merged, [probe_inputs((3, 32, 32))]).fault.startswith("does not run: ")
    merged = merge_branches(network)
    merged.stages[0][0].repmlp_block.fc3.bias.data[:] = float("nan")
    blame = blame_network(network, merged, [probe_inputs((3, 32, 32))])
    assert (blame.place, blame.element.name) == ("stages.0.0 · fc3", "fc3.bias")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("stages.2.5.repmlp_block", ("stages.2.5", "")),
        ("stages.2.5.gp.fc1", ("stages.2.5", "global perceptron · fc1")),
        ("stages.0.1.scale", ("stages.0.1", "prebn1 fold")),
        ("stages.1.0.ffn.2", ("stages.1.0", "ffn_fc2")),
        ("module.stages.1.units.0.fc3", ("stages.1.units.0", "fc3")),
        ("backbone.embeds.0.conv", ("backbone.embeds.0", "")),
        ("conv_embedding.conv", ("conv_embedding", "")),
        ("stage2.3.light_repmlp", ("stage2.3", "light_repmlp")),
        ("head", ("head", "")),
        ("pools.0.1", ("pools.0.1", "")),
        ("", ("", "")),
    ],
)
def test_places_have_the_words_of_the_paper(name: str, place: tuple[str, str]) -> None:
    assert place_of(name) == place


def test_a_blame_is_one_line() -> None:
    element = Element("fc3.weight", (0, 12, 13), 0.25, 0.5)
    blame = Blame("stages.2.5", "fc3 · branch repconv3", "dropped", 0.1, 1e-6, element)
    assert str(blame) == (
        "first at stages.2.5 · fc3 · branch repconv3: dropped; fc3.weight[0, 12, 13] is 0.25, expected 0.5; "
        "off by 1.00e-01, 1e+05 times its noise floor"
    )
    assert str(Blame("", "", "")) == "first at the network"


def test_a_failed_verification_ends_with_the_blame_and_nothing_else_does() -> None:
    with (
        pytest.raises(VerificationError, match=r"^merged differs; first at head: doubled$"),
        blamed(lambda: Blame("head", "", "doubled")),
    ):
        raise VerificationError("merged differs")
    with pytest.raises(VerificationError, match="differs; no single place differs"), blamed(lambda: None):
        raise VerificationError("merged differs")
    with pytest.raises(ValueError, match=r"^other$"), blamed(lambda: Blame("head")):
        raise ValueError("other")


def test_a_search_that_fails_does_not_hide_the_failure() -> None:
    def search() -> Blame | None:
        raise MemoryError("no room\nat all")

    assert describe_blame(search) == "the place could not be found: MemoryError: no room"


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_affines_are_found_by_running(kind: type[nn.Module]) -> None:
    bn = randomize(nn.Sequential(kind(6)))[0]
    for found, expected in zip(affine_by_running(bn), affine_of_batch_norm(bn), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_wrong_affines_are_all_wrong_and_all_different() -> None:
    bn = randomize(nn.Sequential(nn.BatchNorm2d(6)))[0]
    right = torch.cat(affine_by_running(bn))
    values = [torch.cat([a, b]) for _, a, b in wrong_affines(bn)]
    for i, value in enumerate(values):
        assert (value - right).abs().max() > 1e-7
        assert all((value - other).abs().max() > 1e-8 for other in values[:i])


@pytest.mark.parametrize(
    "block",
    [
        RepMLPBlock(8, 3, 5, sharesets=4, kernels=(1, 3), hidden=2),
        RepMLPBlock(4, 4, 2, sharesets=1, kernels=(), hidden=2),
        RepMLP(6, 4, (6, 4), (3, 2), groups=2, kernels=(1, 3, 5)),
    ],
    ids=["2022", "2022 without branches", "2021"],
)
def test_merging_and_the_suspects_agree(block: RepMLPBlock | RepMLP) -> None:
    """Two ways to the same matrix: by strided assignment, and by convolving an identity."""
    block = randomize(block).double()
    merged = block.merged_fc3()
    rows = merged.out_channels // merged.groups
    for g in range(merged.groups):
        weight, bias = merged_matrix(block, g)
        torch.testing.assert_close(merged.weight.view(merged.groups, rows, -1)[g], weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(merged.bias.view(merged.groups, rows)[g], bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fault", ["dropped", "Toeplitz matrix transposed", "matrix transposed"])
def test_large_matrices_are_judged_by_some_of_their_columns(fault: str) -> None:
    """168 positions: more than are looked at."""
    torch.manual_seed(0)
    block = randomize(nn.Sequential(RepMLPBlock(2, 12, 14, sharesets=1, kernels=(1, 3), hidden=2)))
    wrong = copy.deepcopy(block)
    if fault == "dropped":
        wrong[0].repconv3.conv.weight.zero_()
        wrong[0].repconv3.bn.running_mean.zero_()
        wrong[0].repconv3.bn.bias.zero_()
    elif fault == "Toeplitz matrix transposed":
        wrong[0].repconv3.conv.weight.copy_(block[0].repconv3.conv.weight.flip(-1, -2))
    merged = merge_branches(wrong)
    if fault == "matrix transposed":
        weight = merged[0].fc3.weight
        weight.copy_(weight[:, :, 0, 0].T.clone()[:, :, None, None])
    blame = blame_network(block, merged, [np.random.default_rng(0).standard_normal((2, 2, 12, 14), np.float32)])
    part = "fc3" if fault == "matrix transposed" else "fc3 · branch repconv3"
    assert (blame.block, blame.part, blame.fault) == ("0", part, fault)


def test_a_check_takes_the_fault_that_explains_best_or_none() -> None:
    expected = torch.linspace(1, 2, 6, dtype=torch.float64).view(2, 3)
    near = ("x", "near", 2 * expected + 1e-6)
    exact = ("x", "exact", 2 * expected)
    assert Check("p", "w", expected.float(), expected).finding() is None
    found = Check("p", "w", (2 * expected).float(), expected, lambda: [near, exact]).finding()
    assert (found.part, found.fault) == ("x", "exact")
    found = Check("p", "w", (3 * expected).float(), expected, lambda: [near, exact]).finding()
    assert (found.part, found.fault, found.element.index) == ("p", "", (1, 2))
    assert found.element.got == pytest.approx(6)
    assert Check("p", "w", expected.half(), expected).finding() is None
    assert Check("p", "w", expected.half().float(), expected).finding() is not None
    assert Check("p", "w", expected.half().float(), expected, eps=2**-10).finding() is None
