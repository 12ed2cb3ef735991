"""UniRepLKNet's block: a large depthwise kernel and dilated small ones beside it, each with a BatchNorm, added."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.networks import randomize
from support.standins.arithmetic import centred, conv_bn, convolution, dilated, fused

BRANCHES = {7: ((5, 1), (3, 2), (3, 3)), 9: ((5, 1), (5, 2), (3, 3), (3, 4)), 13: ((5, 1), (7, 2), (3, 5))}
"""Large kernel to (kernel, dilation) of each branch beside it."""


class DilatedReparamBlock(nn.Module):
    """(N, C, H, W) -> (N, C, H, W), depthwise; merged by `merge_dilated_branches`."""

    def __init__(self, channels: int, large: int) -> None:
        super().__init__()
        self.lk_origin = nn.Conv2d(channels, channels, large, padding=large // 2, groups=channels, bias=False)
        self.origin_bn = nn.BatchNorm2d(channels)
        self.branches = nn.ModuleList(
            conv_bn(channels, channels, k, dilation=rate, groups=channels) for k, rate in BRANCHES[large]
        )

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "origin_bn"):
            return self.lk_origin(x)
        return self.origin_bn(self.lk_origin(x)) + sum(branch(x) for branch in self.branches)

    @torch.no_grad()
    def merge_dilated_branches(self) -> None:
        kernel, bias = fused(self.lk_origin, self.origin_bn)
        for branch in self.branches:
            small, more = fused(*branch)
            kernel = kernel + centred(dilated(small, branch.conv.dilation[0]), kernel.shape)
            bias = bias + more
        self.lk_origin = convolution(kernel, bias, self.lk_origin)
        del self.origin_bn, self.branches


class UniRepLKNet(nn.Module):
    """A stem, three blocks and a head: (N, 3, 16, 16) -> (N, 5)."""

    example_input = torch.zeros(1, 3, 16, 16)
    blocks = 3

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, 3, stride=2), nn.ReLU())
        self.stages = nn.Sequential(
            *(part for large in BRANCHES for part in (DilatedReparamBlock(8, large), nn.GELU()))
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def make(seed: int = 0) -> nn.Module:
    """Return the network in evaluation mode with BatchNorms far from the identity."""
    torch.manual_seed(seed)
    return randomize(UniRepLKNet(), seed)
