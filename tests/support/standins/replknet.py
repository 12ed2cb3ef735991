"""RepLKNet's block: a large depthwise kernel and a small one beside it, each with a BatchNorm, added."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.networks import randomize
from support.standins.arithmetic import centred, conv_bn, convolution, fused


class ReparamLargeKernelConv(nn.Module):
    """(N, C, H, W) -> (N, C, H, W), depthwise; merged by `merge_kernel`."""

    def __init__(self, channels: int, large: int, small: int) -> None:
        super().__init__()
        self.lkb_origin = conv_bn(channels, channels, large, groups=channels)
        self.small_conv = conv_bn(channels, channels, small, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "lkb_reparam"):
            return self.lkb_reparam(x)
        return self.lkb_origin(x) + self.small_conv(x)

    @torch.no_grad()
    def merge_kernel(self) -> None:
        kernel, bias = fused(*self.lkb_origin)
        small, more = fused(*self.small_conv)
        self.lkb_reparam = convolution(kernel + centred(small, kernel.shape), bias + more, self.lkb_origin.conv)
        del self.lkb_origin, self.small_conv


class LargeKernelBlock(nn.Module):
    """A residual block: BatchNorm, 1×1, large kernel, 1×1."""

    def __init__(self, channels: int, large: int, small: int) -> None:
        super().__init__()
        self.prelkb_bn = nn.BatchNorm2d(channels)
        self.pw1 = conv_bn(channels, channels, 1)
        self.large_kernel = ReparamLargeKernelConv(channels, large, small)
        self.pw2 = conv_bn(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.pw1(self.prelkb_bn(x)).relu()
        return x + self.pw2(self.large_kernel(inside).relu())


class RepLKNet(nn.Module):
    """A stem, three blocks and a head: (N, 3, 16, 16) -> (N, 5)."""

    example_input = torch.zeros(1, 3, 16, 16)
    blocks = 3

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, 3, stride=2), nn.ReLU())
        self.stages = nn.Sequential(LargeKernelBlock(8, 7, 3), LargeKernelBlock(8, 9, 5), LargeKernelBlock(8, 13, 5))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def make(seed: int = 0) -> nn.Module:
    """Return the network in evaluation mode with BatchNorms far from the identity."""
    torch.manual_seed(seed)
    return randomize(RepLKNet(), seed)
