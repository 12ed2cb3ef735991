"""The RepMLP block of 2022 (RepMLPNet, CVPR 2022), parametrised and named as the paper and its checkpoints do.

Shapes use the papers' letters: N batch, C channels, (H, W) the map, (h, w) a partition, S sharesets, k branch kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.algebra import (
    affine_of_batch_norm,
    constant,
    grouped_product,
    scale_rows,
    set_convolution,
    sum_kernels,
)
from repmlp_deploy.nets.blocks.conv_bn import ConvBN

__all__ = ["FoldedBlock", "GlobalPerceptron", "RepMLPBlock"]


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


class FoldedBlock(RepMLPBlock):
    """A merged RepMLP block of 2022 outside a unit of ours, FC3 transposed once: `weight` is (S, h·w, h·w)."""

    def __init__(self, block: RepMLPBlock) -> None:
        nn.Module.__init__(self)
        if block.fc3.bias is None:
            raise ValueError("a RepMLP block still has its branches: merge before folding")
        self.C, self.S, self.h, self.w, self.kernels = block.C, block.S, block.h, block.w, ()
        self.gp, self.fc3_bn = block.gp, None
        area = block.h * block.w
        self.weight = constant(block.fc3.weight.detach().view(self.S, area, area).transpose(1, 2).contiguous())
        self.bias = constant(block.fc3.bias.detach().view(self.S, area))

    def _apply_fc3(self, rows: Tensor) -> Tensor:
        return grouped_product(rows.flatten(1), self.weight).view(-1, *rows.shape[1:]) + self.bias
