"""ACNet's block: a square kernel, a column and a row, each with a BatchNorm, added."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.networks import randomize
from support.standins.arithmetic import centred, conv_bn, convolution, fused


class ACBlock(nn.Module):
    """(N, C, H, W) -> (N, O, H/stride, W/stride); merged by `switch_to_deploy`."""

    def __init__(self, c: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.square = conv_bn(c, o, k, stride=stride, groups=groups)
        self.column = conv_bn(c, o, (k, 1), stride=stride, groups=groups)
        self.row = conv_bn(c, o, (1, k), stride=stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "merged"):
            return self.merged(x)
        return self.square(x) + self.column(x) + self.row(x)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        kernel, bias = fused(*self.square)
        for branch in (self.column, self.row):
            thin, more = fused(*branch)
            kernel, bias = kernel + centred(thin, kernel.shape), bias + more
        self.merged = convolution(kernel, bias, self.square.conv)
        del self.square, self.column, self.row


class ACNet(nn.Module):
    """Four blocks and a head: (N, 3, 16, 16) -> (N, 5)."""

    example_input = torch.zeros(1, 3, 16, 16)
    blocks = 4

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(ACBlock(3, 8, stride=2), nn.ReLU()),
            *(ACBlock(8, 8, k=5), nn.ReLU()),
            *(ACBlock(8, 12, groups=4), nn.ReLU()),
            *(ACBlock(12, 12), nn.ReLU()),
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


def make(seed: int = 0) -> nn.Module:
    """Return the network in evaluation mode with BatchNorms far from the identity."""
    torch.manual_seed(seed)
    return randomize(ACNet(), seed)
