"""Convolutions with a BatchNorm, as parts of blocks and networks; merged or folded, one convolution with a bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.algebra import BatchNorm, affine_of_batch_norm, constant, fuse_batch_norm
from repmlp_deploy.nets.blocks.checks import Check, absorbed_checks, fused_checks, parameter_checks
from repmlp_deploy.nets.blocks.protocol import Reparameterizable

__all__ = ["ChannelAffine", "ConvBN", "FoldedConv", "MergeableConvBN"]


class ConvBN(Reparameterizable):
    """A convolution without bias, its BatchNorm, and optionally a ReLU: (N, C, H, W) -> (N, O, H', W')."""

    def __init__(  # noqa: PLR0913 - a convolution has that many numbers
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
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

    @classmethod
    def from_parts(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, *, relu: bool = False) -> Self:
        """Return one that holds these very modules."""
        with torch.device("meta"):  # the parts bring the memory
            made = cls(1, 1, 1, relu=relu)
        made.conv, made.bn = conv, bn
        return made

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return F.relu(y) if self.relu else y

    def folded(self) -> dict[nn.Module, nn.Module]:
        """Return the convolution that replaces it."""
        return {self: FoldedConv(fuse_batch_norm(self.conv, self.bn), relu=self.relu)}

    def checks(self, made: nn.Module) -> Iterator[Check]:
        """Yield the checks of the folded convolution, or of an unchanged one."""
        if isinstance(made, FoldedConv):
            yield from fused_checks(self.conv, self.bn, made.conv)
        else:
            yield from parameter_checks(self, made, "")


class MergeableConvBN(Reparameterizable):
    """A ConvBN that merging fuses, as the networks of 2021 do and RepMLPNet does not: (N, C, H, W) -> (N, O, H', W').

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: k; padding is k//2.
        stride: of the convolution.
        relu: whether a ReLU follows.
        deploy: build the merged form, a convolution with a bias and no BatchNorm.
    """

    mergeable = True

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

    @classmethod
    def from_parts(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, *, relu: bool) -> Self:
        """Return one that holds these very modules; without `bn` it is the merged form."""
        with torch.device("meta"):  # the parts bring the memory
            made = cls(1, 1, 1, relu=relu, deploy=bn is None)
        made.conv, made.bn = conv, bn
        return made

    @property
    def deploy(self) -> bool:
        """Whether the BatchNorm is merged into the convolution."""
        return self.bn is None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.bn is not None:
            y = self.bn(y)
        return F.relu(y) if self.relu else y

    def merged(self) -> MergeableConvBN:
        """Return it with the BatchNorm absorbed into the convolution."""
        return MergeableConvBN.from_parts(self.merged_conv(), None, relu=self.relu)

    def checks(self, made: nn.Module) -> Iterator[Check]:
        """Yield the checks of the merged convolution, or of an unchanged one."""
        if self.bn is not None and isinstance(made, MergeableConvBN):
            yield from fused_checks(self.conv, self.bn, made.conv)
        else:
            yield from parameter_checks(self, made, "")

    def merged_conv(self) -> nn.Conv2d:
        """Return the convolution with its BatchNorm absorbed."""
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
    """A convolution with a bias, optionally followed by a ReLU."""

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

    def checks(self, bn: BatchNorm) -> Iterator[Check]:
        """Yield the checks of a and b against the BatchNorm that this module replaced."""

        def values(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a.view(-1, 1, 1), b.view(-1, 1, 1)

        return absorbed_checks("norm fold", bn, values, [("scale", self.scale), ("shift", self.shift)])
