import numpy as np
import pytest
import torch
from torch.nn import functional as F

from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from support.golden_cases import GoldenCase, names
from support.networks import randomize


def golden_block(case: GoldenCase) -> RepMLPBlock:
    config = case.config
    block = RepMLPBlock(
        config["in_channels"],
        config["h"],
        config["w"],
        sharesets=config["num_sharesets"],
        kernels=config["reparam_conv_k"] or (),
        hidden=case.about["state_dict"]["gp.fc1.weight"][0],
    )
    block.load_state_dict(case.weights())
    return block.double().eval().requires_grad_(requires_grad=False)


@pytest.mark.parametrize("name", names("block-v2-"))
@pytest.mark.parametrize("as_convolution", [False, True])
def test_golden_blocks_before_and_after_merging(name: str, as_convolution: bool) -> None:
    case = GoldenCase(name)
    block = golden_block(case)
    block.as_convolution = as_convolution
    x = torch.from_numpy(case.input()).double()
    np.testing.assert_allclose(block(x).numpy(), case.output(), rtol=0, atol=1e-10)
    block.switch_to_deploy()
    assert not any("repconv" in key or "fc3_bn" in key for key in block.state_dict())
    assert "fc3.bias" in block.state_dict()
    np.testing.assert_allclose(block(x).numpy(), case.output(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in names("block-v2-") if n != "block-v2-no-branch"])
def test_a_forgotten_branch_is_far_from_golden(name: str) -> None:
    """The twin of the test above: its tolerance can fail."""
    case = GoldenCase(name)
    block = golden_block(case)
    block.kernels = block.kernels[:-1]
    block.switch_to_deploy()
    assert np.abs(block(torch.from_numpy(case.input()).double()).numpy() - case.output()).max() > 1e-2


def test_merging_twice_changes_nothing() -> None:
    block = golden_block(GoldenCase("block-v2-square"))
    block.switch_to_deploy()
    before = block.fc3.weight.clone()
    block.switch_to_deploy()
    assert torch.equal(block.fc3.weight, before)
    with pytest.raises(ValueError, match="merged already"):
        block.merged_fc3()


def test_channels_and_partitions_change_places_when_sharesets_are_fewer_than_channels() -> None:
    """Rows are cut as (partition, channel // S) and reassembled as (channel // S, partition), as the release does."""
    torch.manual_seed(0)
    C, S, h, w = 4, 2, 2, 3
    block = randomize(RepMLPBlock(C, h, w, sharesets=S, kernels=(1, 3), hidden=2)).double()
    x = torch.randn(2, C, 4, 6, dtype=torch.float64)
    rows = F.unfold(x, (h, w), stride=(h, w)).view(2, C, h * w, 4).permute(0, 3, 1, 2)  # (N, partitions, C, h·w)
    rows = rows.reshape(-1, S, h, w)
    y = block.fc3_bn(block.fc3(rows.reshape(-1, S * h * w, 1, 1)).reshape(-1, S, h, w))
    for branch in block.branches():
        y = y + branch(rows)
    y = y.reshape(2, C // S, 2, 2, S, h, w).permute(0, 1, 4, 2, 5, 3, 6).reshape(2, C, 4, 6)
    torch.testing.assert_close(block(x), y * block.gp(x), rtol=0, atol=1e-12)
    straight = y.reshape(2, C // S, S, 4, 6).flip(1).reshape(2, C, 4, 6)
    assert not torch.allclose(block(x), straight * block.gp(x))


def test_a_map_that_does_not_divide_is_refused() -> None:
    block = RepMLPBlock(4, 2, 2, sharesets=2, hidden=1)
    with pytest.raises(ValueError, match="map is 3x4; it must divide into 2x2 partitions"):
        block(torch.zeros(1, 4, 3, 4))


def test_sharesets_must_divide_channels() -> None:
    with pytest.raises(ValueError, match="4 channels cannot be shared by 3 sharesets"):
        RepMLPBlock(4, 2, 2, sharesets=3, hidden=1)
