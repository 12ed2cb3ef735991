"""RepVGG's block: a 3×3 convolution, a 1×1 convolution and the identity, each with a BatchNorm, added."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.networks import randomize
from support.standins.arithmetic import centred, conv_bn, convolution, fused, scaled, unit_kernel


class RepVGGBlock(nn.Module):
    """(N, C, H, W) -> (N, O, H/stride, W/stride); merged by `switch_to_deploy`."""

    def __init__(self, c: int, o: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(c) if c == o and stride == 1 else None
        self.rbr_dense = conv_bn(c, o, 3, stride=stride, groups=groups)
        self.rbr_1x1 = conv_bn(c, o, 1, stride=stride, groups=groups)
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.rbr_reparam(x))
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.nonlinearity(self.rbr_dense(x) + self.rbr_1x1(x) + identity)

    def merged_kernel(self) -> tuple[Tensor, Tensor]:
        kernel, bias = fused(*self.rbr_dense)
        small, more = fused(*self.rbr_1x1)
        kernel, bias = kernel + centred(small, kernel.shape), bias + more
        if self.rbr_identity is not None:
            a, b = scaled(self.rbr_identity)
            conv = self.rbr_dense.conv
            unit = unit_kernel(conv.in_channels, conv.groups, 3, kernel)
            kernel, bias = kernel + a[:, None, None, None] * unit, bias + b
        return kernel, bias

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        self.rbr_reparam = convolution(*self.merged_kernel(), self.rbr_dense.conv)
        del self.rbr_dense, self.rbr_1x1, self.rbr_identity


class RepVGG(nn.Module):
    """Five blocks, of several strides and groups, and a head: (N, 3, 16, 16) -> (N, 5)."""

    example_input = torch.zeros(1, 3, 16, 16)
    blocks = 5

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            RepVGGBlock(3, 8, stride=2),
            RepVGGBlock(8, 8),
            RepVGGBlock(8, 8, groups=2),
            RepVGGBlock(8, 12, stride=2),
            RepVGGBlock(12, 12),
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


def make(seed: int = 0) -> nn.Module:
    """Return the network in evaluation mode with BatchNorms far from the identity."""
    torch.manual_seed(seed)
    return randomize(RepVGG(), seed)
