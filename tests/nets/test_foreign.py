"""Blocks of other packages: recognised by structure, confirmed by outputs, merged as ours are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from repmlp_deploy.convert.reparam.merge import merge_branches
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from repmlp_deploy.nets.foreign import adopt_blocks, has_branches
from support.foreign_blocks import Block2021, Block2022, MmpretrainBlock, WrongBlock
from support.golden_cases import GoldenCase, assert_matches_golden
from support.networks import randomize


def _foreign(case: GoldenCase) -> nn.Module:
    """The stand-in of a golden case, with its weights."""
    given, kernels = case.config, tuple(case.config["reparam_conv_k"] or ())
    if "fc3_groups" in given:
        sizes = (given["in_channels"], given["out_channels"], (given["H"], given["W"]), (given["h"], given["w"]))
        block: nn.Module = Block2021(*sizes, kernels, given["fc3_groups"], given["fc1_fc2_reduction"])
    else:
        hidden = case.about["state_dict"]["gp.fc1.weight"][0]
        block = Block2022(given["in_channels"], given["h"], given["w"], given["num_sharesets"], kernels, hidden)
    block.load_state_dict(case.weights(), strict=True)
    return block.eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    "name",
    ["block-v1-global", "block-v1-rectangle", "block-v1-one-partition", "block-v2-partitions", "block-v2-square"],
)
def test_official_blocks_are_merged_without_their_package(name: str) -> None:
    case = GoldenCase(name)
    block, x = _foreign(case).double(), torch.from_numpy(case.input()).double()
    assert_matches_golden(block(x).numpy(), case.output(), atol=1e-10)  # the stand-in is faithful
    merged = merge_branches(block)
    assert_matches_golden(merged(x).numpy(), case.output(), atol=1e-10)
    assert "fc3.bias" in merged.state_dict()
    assert not has_branches(merged)


def test_mmpretrains_blocks_keep_the_names_of_their_gates() -> None:
    """So that the merged state dict is the one mmpretrain's deploy mode loads."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), randomize(MmpretrainBlock(8, 2, 3, 4, (1, 3), 2))).eval().double()
    x = torch.randn(2, 3, 4, 9, dtype=torch.float64)
    merged = merge_branches(network)
    torch.testing.assert_close(merged(x), network(x), rtol=1e-12, atol=1e-12)
    gate = [f"1.gp.conv{i}.conv.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert set(merged.state_dict()) == {"0.weight", "0.bias", *gate, "1.fc3.weight", "1.fc3.bias"}


def test_a_block_that_computes_something_else_is_refused_by_name() -> None:
    torch.manual_seed(0)
    network = nn.ModuleDict({"neck": randomize(WrongBlock(4, 2, 2, 2, (1,), 2))}).eval()
    with pytest.raises(ValueError, match=r"neck \(WrongBlock\) .* computes something else"):
        merge_branches(network)


def test_a_subclass_of_ours_with_its_own_arithmetic_is_refused() -> None:
    class Doubled(RepMLPBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="computes something else"):
        merge_branches(randomize(Doubled(4, 2, 2, sharesets=2, hidden=2)))


def test_a_branch_with_a_bias_is_refused() -> None:
    torch.manual_seed(0)
    block = randomize(Block2022(4, 3, 3, 2, (3,), 2))
    block.repconv3.conv.bias = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="computes something else"):
        merge_branches(block)


def test_a_block_for_one_partition_only_is_merged() -> None:
    """Where a map of several partitions is refused, one partition confirms."""

    class Whole(Block2022):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[2:] == (self.h, self.w), "one partition"
            return super().forward(x)

    torch.manual_seed(0)
    block = randomize(Whole(4, 3, 2, 2, (1, 3), 2)).double()
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(merge_branches(block)(x), block(x), rtol=1e-12, atol=1e-12)


def test_a_block_without_edges_asks_for_them() -> None:
    block = randomize(Block2022(4, 2, 2, 2, (1,), 2))
    del block.h
    with pytest.raises(ValueError, match="set the attributes h and w or path_h and path_w"):
        merge_branches(block)


def test_other_modules_with_an_fc3_are_none_of_ours() -> None:
    network = nn.ModuleDict({"fc3": nn.Conv2d(4, 4, 1, bias=False), "fc4": nn.Linear(2, 2)}).eval()
    assert adopt_blocks(network) == {}
    with pytest.raises(ValueError, match="contains no RepMLP block"):
        merge_branches(network)


class FrozenNorm(nn.Module):
    """The frozen BatchNorm of detection toolkits, whose buffers are all there is: it has no eps."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * self.running_var.rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def test_frozen_norms_without_an_eps_are_merged_as_they_are() -> None:
    torch.manual_seed(0)
    block = randomize(Block2022(8, 2, 3, 4, (1, 3), 2)).eval().double()
    block.fc3_bn = FrozenNorm(block.fc3_bn)
    for k in (1, 3):
        branch = getattr(block, f"repconv{k}")
        branch.bn = FrozenNorm(branch.bn)
    block.eval()
    x = torch.randn(2, 8, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(merge_branches(block)(x), block(x), rtol=1e-12, atol=1e-12)
