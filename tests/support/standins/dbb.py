"""The diverse branch block: k×k, 1×1, 1×1 then k×k, and 1×1 then average pool, each with BatchNorms, added.

Where a padded k×k follows a BatchNorm, the border is filled with what the BatchNorm makes of zero. The padding then
stands before the BatchNorm, and the branch equals one convolution with zero padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.networks import randomize
from support.standins.arithmetic import centred, conv_bn, convolution, fused, scaled


class BatchNormThenPad(nn.Module):
    """A BatchNorm whose output is padded with what it makes of zero."""

    def __init__(self, channels: int, pad: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        _, border = scaled(self.bn)
        padded = F.pad(self.bn(x), [self.pad] * 4)
        inside = F.pad(torch.ones_like(x[:, :1]), [self.pad] * 4)
        return padded + (1 - inside) * border[None, :, None, None]


class DiverseBranchBlock(nn.Module):
    """(N, C, H, W) -> (N, O, H, W); merged by `switch_to_deploy`."""

    def __init__(self, c: int, o: int, k: int = 3, groups: int = 1) -> None:
        super().__init__()
        self.dbb_origin = conv_bn(c, o, k, groups=groups)
        self.dbb_1x1 = conv_bn(c, o, 1, groups=groups)
        self.dbb_1x1_kxk = nn.Sequential()
        self.dbb_1x1_kxk.add_module("idconv1", nn.Conv2d(c, c, 1, groups=groups, bias=False))
        self.dbb_1x1_kxk.add_module("bn1", BatchNormThenPad(c, k // 2))
        self.dbb_1x1_kxk.add_module("conv2", nn.Conv2d(c, o, k, groups=groups, bias=False))
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(o))
        self.dbb_avg = nn.Sequential()
        self.dbb_avg.add_module("conv", nn.Conv2d(c, o, 1, groups=groups, bias=False))
        self.dbb_avg.add_module("bn", BatchNormThenPad(o, k // 2))
        self.dbb_avg.add_module("avg", nn.AvgPool2d(k, stride=1))
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "dbb_reparam"):
            return self.dbb_reparam(x)
        return self.dbb_origin(x) + self.dbb_1x1(x) + self.dbb_1x1_kxk(x) + self.dbb_avg(x)

    def merged_kernel(self) -> tuple[Tensor, Tensor]:
        kernel, bias = fused(*self.dbb_origin)
        small, more = fused(*self.dbb_1x1)
        kernel, bias = kernel + centred(small, kernel.shape), bias + more
        first, conv, bn = self.dbb_1x1_kxk.idconv1, self.dbb_1x1_kxk.conv2, self.dbb_1x1_kxk.bn2
        added = self._chained(fused(first, self.dbb_1x1_kxk.bn1.bn), fused(conv, bn))
        kernel, bias = kernel + added[0], bias + added[1]
        pool, bn = self.dbb_avg.avg.kernel_size, self.dbb_avg.avgbn
        a, b = scaled(bn)
        point, shift = fused(self.dbb_avg.conv, self.dbb_avg.bn.bn)
        mean = (a[:, None, None, None] * point).expand(-1, -1, pool, pool) / pool**2
        return kernel + mean, bias + a * shift + b

    def _chained(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return kernel and bias of a 1×1 convolution and the k×k convolution after it, group by group."""
        groups, kernels, biases = self.dbb_origin.conv.groups, [], []
        parts = zip(*(value.chunk(groups) for value in (*first, *second)), strict=True)
        for point, shift, kernel, bias in parts:
            kernels.append(torch.einsum("ocyx,ci->oiyx", kernel, point[:, :, 0, 0]))
            biases.append(bias + torch.einsum("ocyx,c->o", kernel, shift))
        return torch.cat(kernels), torch.cat(biases)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        self.dbb_reparam = convolution(*self.merged_kernel(), self.dbb_origin.conv)
        del self.dbb_origin, self.dbb_1x1, self.dbb_1x1_kxk, self.dbb_avg


class DiverseBranchNet(nn.Module):
    """Four blocks and a head: (N, 3, 12, 12) -> (N, 5)."""

    example_input = torch.zeros(1, 3, 12, 12)
    blocks = 4

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(DiverseBranchBlock(3, 8), nn.ReLU()),
            *(DiverseBranchBlock(8, 8, groups=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(DiverseBranchBlock(8, 12), nn.ReLU()),
            *(DiverseBranchBlock(12, 12, k=5), nn.ReLU()),
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


def make(seed: int = 0) -> nn.Module:
    """Return the network in evaluation mode with BatchNorms far from the identity."""
    torch.manual_seed(seed)
    return randomize(DiverseBranchNet(), seed)
