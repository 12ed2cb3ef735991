"""Blocks of RepMLPNet (CVPR 2022), parametrised and named as the paper and its checkpoints do.

Shapes use the papers' letters: N batch, C channels, (H, W) the map, (h, w) a partition, S sharesets, k branch kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.algebra import (
    affine_of_batch_norm,
    fuse_batch_norm,
    scale_rows,
    set_convolution,
    sum_kernels,
)

__all__ = [
    "FFN",
    "ConvBN",
    "GlobalPerceptron",
    "MergeableConvBN",
    "RepMLPBlock",
    "RepMLPUnit",
    "switch_blocks",
]


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


class GlobalPerceptron(nn.Module):
    """A gate per channel from the map's mean: σ(FC2(ReLU(FC1(avgpool(x))))), (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3), keepdim=True)  # (N, C, H, W) -> (N, C, 1, 1)
        return torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))


class RepMLPBlock(nn.Module):
    """The RepMLP block of 2022 (CVPR 2022, section 3): (N, C, H, W) -> (N, C, H, W).

    The map is cut into (h, w) partitions. Each row of S·h·w values, S channels of one partition, passes FC3,
    in which shareset s has its own (h·w × h·w) matrix; depthwise convolutions over the same rows run beside it
    while training. The sum is gated per channel by the global perceptron.

    With several partitions and S < C, channels and partitions change places on the way out: cutting orders rows as
    (partition, channel // S), reassembling reads them as (channel // S, partition). That is the official network's
    order, and trained weights depend on it.

    FC3 is stored as the grouped 1×1 convolution of the release, but computed as the batched product it is, which is
    several times faster; with `as_convolution` set it runs in the release's form, as a baseline.

    Args:
        channels: C, in and out.
        h: height of a partition.
        w: width of a partition.
        sharesets: S; divides C.
        kernels: odd branch kernels k; empty for none.
        hidden: width of the global perceptron.
        deploy: build the merged form, FC3 with a bias and no BatchNorm or branch.
    """

    def __init__(  # noqa: PLR0913 - the paper's hyper-parameters
        self,
        channels: int,
        h: int,
        w: int,
        *,
        sharesets: int = 1,
        kernels: Sequence[int] = (1, 3),
        hidden: int,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        if channels % sharesets:
            raise ValueError(f"{channels} channels cannot be shared by {sharesets} sharesets: it must divide")
        self.C, self.S, self.h, self.w = channels, sharesets, h, w
        self.kernels = () if deploy else tuple(kernels)
        self.gp = GlobalPerceptron(channels, hidden)
        self.fc3 = nn.Conv2d(sharesets * h * w, sharesets * h * w, 1, groups=sharesets, bias=deploy)
        self.fc3_bn = None if deploy else nn.BatchNorm2d(sharesets)
        self.as_convolution = False
        for k in self.kernels:
            branch = ConvBN(sharesets, sharesets, k, padding=k // 2, groups=sharesets)
            self.add_module(f"repconv{k}", branch)

    @property
    def deploy(self) -> bool:
        """Whether the branches are merged into FC3."""
        return self.fc3_bn is None

    def branches(self) -> list[ConvBN]:
        """The convolution branches, in the order of `kernels`."""
        return [self.get_submodule(f"repconv{k}") for k in self.kernels]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        C, S, h, w = self.C, self.S, self.h, self.w
        if x.shape[2] % h or x.shape[3] % w:
            raise ValueError(f"map is {x.shape[2]}x{x.shape[3]}; it must divide into {h}x{w} partitions")
        rows, columns = x.shape[2] // h, x.shape[3] // w
        partitions = x.reshape(-1, C, rows, h, columns, w)
        partitions = partitions.permute(0, 2, 4, 1, 3, 5).contiguous()  # (N, rows, columns, C, h, w)
        y = self._apply_fc3(partitions.reshape(-1, S, h * w)).reshape(-1, S, h, w)
        if self.fc3_bn is not None:
            y = self.fc3_bn(y)
        if self.kernels:
            windows = partitions.reshape(-1, S, h, w)
            for branch in self.branches():
                y = y + branch(windows)
        y = (
            y.reshape(-1, rows, columns, S, h, w).permute(0, 3, 1, 4, 2, 5).contiguous()
        )  # (N·C/S, S, rows, h, columns, w)
        gate: Tensor = self.gp(x)
        return y.reshape(-1, *x.shape[1:]) * gate

    def _apply_fc3(self, rows: Tensor) -> Tensor:
        """FC3 of every row: (M, S, h·w) -> (M, S, h·w)."""
        if self.as_convolution:
            y: Tensor = self.fc3(rows.reshape(-1, self.S * self.h * self.w, 1, 1))
            return y.reshape(rows.shape)
        area = self.h * self.w
        weight = self.fc3.weight.view(self.S, area, area).transpose(1, 2)
        y = (rows.transpose(0, 1) @ weight).transpose(0, 1)  # (S, M, h·w) × (S, h·w, h·w)
        return y if self.fc3.bias is None else y + self.fc3.bias.view(self.S, area)

    def merged_fc3(self) -> nn.Conv2d:
        """FC3 with its BatchNorm and every branch absorbed, in FC3's dtype; see `nets.blocks.algebra`."""
        if self.fc3_bn is None:
            raise ValueError("this RepMLPBlock is merged already")
        S, h, w = self.S, self.h, self.w
        scale, shift = affine_of_batch_norm(self.fc3_bn)
        kernels = []
        for branch in self.branches():
            branch_scale, branch_shift = affine_of_batch_norm(branch.bn)
            kernels.append(branch.conv.weight.detach().double()[:, 0] * branch_scale[:, None, None])  # (S, k, k)
            shift = shift + branch_shift
        rows = scale.repeat_interleave(h * w)
        weight = scale_rows(self.fc3.weight.detach().reshape(S * h * w, h * w), rows)
        kernel = sum_kernels(kernels)
        if kernel is not None:
            set_convolution(
                weight.view(S, h, w, h, w),
                self.fc3.weight.detach().reshape(S, h, w, h, w),
                rows.view(S, h, w),
                kernel,
            )
        merged = nn.Conv2d(S * h * w, S * h * w, 1, groups=S, bias=True, device="meta", dtype=weight.dtype)
        merged.weight = nn.Parameter(weight.view_as(self.fc3.weight), requires_grad=False)
        merged.bias = nn.Parameter(shift.repeat_interleave(h * w).to(weight.dtype), requires_grad=False)
        return merged

    def switch_to_deploy(self) -> None:
        """Merge in place; merging twice changes nothing."""
        if self.deploy:
            return
        self.fc3 = self.merged_fc3()
        self.fc3_bn = None
        for k in self.kernels:
            delattr(self, f"repconv{k}")
        self.kernels = ()


class FFN(nn.Module):
    """Two 1×1 convolutions with BatchNorm, GELU between: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.ffn_fc1 = ConvBN(channels, hidden, 1)
        self.ffn_fc2 = ConvBN(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn_fc2(F.gelu(self.ffn_fc1(x)))
        return y


class RepMLPUnit(nn.Module):
    """One residual unit of RepMLPNet: y = x + RepMLP(BN(x)), then z = y + FFN(BN(y))."""

    def __init__(self, block: RepMLPBlock, ffn_hidden: int) -> None:
        super().__init__()
        self.repmlp_block = block
        self.ffn_block = FFN(block.C, ffn_hidden)
        self.prebn1 = nn.BatchNorm2d(block.C)
        self.prebn2 = nn.BatchNorm2d(block.C)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.repmlp_block(self.prebn1(x))
        z: Tensor = y + self.ffn_block(self.prebn2(y))
        return z


@torch.no_grad()
def switch_blocks(root: nn.Module) -> None:
    """Merge what can be merged below `root` in place; what is merged already stays as it is."""
    for module in list(root.modules()):
        switch: Callable[[], None] | None = getattr(module, "switch_to_deploy", None)
        if module is not root and switch is not None:
            switch()
