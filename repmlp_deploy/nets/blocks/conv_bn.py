"""Convolutions with a BatchNorm, as parts of blocks and networks; merged or folded, one convolution with a bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.algebra import affine_of_batch_norm, constant, fuse_batch_norm

__all__ = ["ChannelAffine", "ConvBN", "FoldedConv", "MergeableConvBN"]


class ConvBN(nn.Module):
    """A convolution without bias, its BatchNorm, and optionally a ReLU: (N, C, H, W) -> (N, O, H', W')."""

    def __init__(  # noqa: PLR0913 - a convolution has that many numbers
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return F.relu(y) if self.relu else y


class MergeableConvBN(nn.Module):
    """A ConvBN that merging fuses, as the networks of 2021 do and RepMLPNet does not: (N, C, H, W) -> (N, O, H', W').

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: k; padding is k//2.
        stride: of the convolution.
        relu: whether a ReLU follows.
        deploy: build the merged form, a convolution with a bias and no BatchNorm.
    """

    def __init__(  # noqa: PLR0913 - a convolution has that many numbers
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        relu: bool = False,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=deploy)
        self.bn = None if deploy else nn.BatchNorm2d(out_channels)
        self.relu = relu

    @property
    def deploy(self) -> bool:
        """Whether the BatchNorm is merged into the convolution."""
        return self.bn is None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.bn is not None:
            y = self.bn(y)
        return F.relu(y) if self.relu else y

    def merged_conv(self) -> nn.Conv2d:
        """The convolution with its BatchNorm absorbed."""
        if self.bn is None:
            raise ValueError("this convolution is merged already")
        return fuse_batch_norm(self.conv, self.bn)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Merge in place; merging twice changes nothing."""
        if self.bn is not None:
            self.conv = self.merged_conv()
            self.bn = None


class FoldedConv(nn.Module):
    """A convolution with a bias, optionally a ReLU behind it."""

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        self.conv = conv
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return F.relu(y) if self.relu else y


class ChannelAffine(nn.Module):
    """a·x + b per channel: (N, C, H, W) -> (N, C, H, W), what a BatchNorm is where nothing linear is its neighbour."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if bn.running_mean is None else bn.running_mean.dtype
        a, b = (part.view(-1, 1, 1).to(dtype) for part in affine_of_batch_norm(bn))
        self.scale, self.shift = constant(a), constant(b)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift
