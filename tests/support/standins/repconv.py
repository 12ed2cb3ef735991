"""YOLOv7's RepConv: RepVGG's three branches with SiLU, inside a small detector's backbone with a route."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.networks import randomize
from support.standins.arithmetic import conv_bn, convolution
from support.standins.repvgg import RepVGGBlock


class RepConv(RepVGGBlock):
    """(N, C, H, W) -> (N, O, H/stride, W/stride); merged by `fuse_repvgg_block`."""

    switch_to_deploy = None

    def __init__(self, c: int, o: int, stride: int = 1) -> None:
        super().__init__(c, o, stride)
        self.nonlinearity = nn.SiLU()

    @torch.no_grad()
    def fuse_repvgg_block(self) -> None:
        self.rbr_reparam = convolution(*self.merged_kernel(), self.rbr_dense.conv)
        del self.rbr_dense, self.rbr_1x1, self.rbr_identity


class Detector(nn.Module):
    """Five RepConvs on two scales: (N, 3, 16, 16) -> maps (N, 6, 8, 8) and (N, 6, 4, 4)."""

    example_input = torch.zeros(1, 3, 16, 16)
    blocks = 5

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, 3, stride=2), nn.SiLU())
        self.fine = nn.Sequential(RepConv(8, 8), RepConv(8, 12))
        self.coarse = nn.Sequential(RepConv(12, 12, stride=2), RepConv(12, 12))
        self.route = RepConv(12, 8)
        self.detect_fine = nn.Conv2d(20, 6, 1)
        self.detect_coarse = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        route = nn.functional.interpolate(self.route(coarse), scale_factor=2.0)
        return self.detect_fine(torch.cat([fine, route], 1)), self.detect_coarse(coarse)


def make(seed: int = 0) -> nn.Module:
    """Return the network in evaluation mode with BatchNorms far from the identity."""
    torch.manual_seed(seed)
    return randomize(Detector(), seed)
