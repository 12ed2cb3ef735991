"""Families that timm does not have: one convolution per block, as their own hooks leave, without calling any."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repmlp_deploy.convert.reparam.regions import merge_regions
from repmlp_deploy.nets.flat import flatten_outputs
from support.networks import randomize
from support.standins import STANDINS

HOOKS = ("switch_to_deploy", "merge_kernel", "merge_dilated_branches", "fuse_repvgg_block")
LAYERS = (nn.Conv2d, nn.Linear)


class PaddedByAssignment(nn.Module):
    """A BatchNorm whose border is written afterwards, row by row, as the diverse branch block's own code does."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv, self.beside = nn.Conv2d(4, 4, 3), nn.Conv2d(3, 4, 3, padding=1)

    def border(self) -> Tensor:
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        return (self.norm.bias - self.norm.running_mean * scale).view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.norm(self.point(x)), [1] * 4)
        y[:, :, 0:1, :] = self.border()
        y[:, :, -1:, :] = self.border()
        y[:, :, :, 0:1] = self.border()
        y[:, :, :, -1:] = self.border()
        return F.relu(self.conv(y) + self.beside(x))


class PaddedWrongly(PaddedByAssignment):
    """The same with another constant around: no convolution computes it."""

    def border(self) -> Tensor:
        return super().border() + 1


def _flat(answer: object) -> Tensor:
    return torch.cat([value.flatten() for value in flatten_outputs(answer).values()])


@pytest.mark.parametrize("family", STANDINS)
def test_a_family_becomes_what_its_own_hooks_make_of_it(family: str) -> None:
    network = STANDINS[family]().double()
    x = torch.randn(2, *network.example_input.shape[1:], dtype=torch.float64)
    merged = merge_regions(network, (x,))
    expected = _flat(network(x))
    assert float((_flat(merged.value(x)) - expected).abs().max() / expected.abs().max()) <= 1e-14
    by_hooks = copy.deepcopy(network)
    for module in list(by_hooks.modules()):
        hook = next((getattr(module, name) for name in HOOKS if hasattr(module, name)), None)
        if hook is not None:
            hook()
    assert merged.report.after["products"] <= sum(isinstance(module, LAYERS) for module in by_hooks.modules())
    assert merged.report.after["BatchNorms"] == 0
    assert sum(region.branches > 1 for region in merged.report.regions) >= network.blocks


def test_a_border_that_is_written_over_is_followed() -> None:
    network, x = randomize(PaddedByAssignment()).double(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    merged = merge_regions(network, (x,))
    torch.testing.assert_close(merged.value(x[:1]), network(x[:1]), rtol=0, atol=1e-13)
    assert merged.report.after["products"] == 1


def test_another_border_is_not_taken_for_it() -> None:
    network, x = randomize(PaddedWrongly()).double(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    merged = merge_regions(network, (x,))
    torch.testing.assert_close(merged.value(x[:1]), network(x[:1]), rtol=0, atol=1e-13)
    assert merged.report.after["products"] == 3
