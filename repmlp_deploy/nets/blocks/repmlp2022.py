"""The RepMLP block of 2022 (RepMLPNet, CVPR 2022), parametrised and named as the paper and its checkpoints do.

Shapes use the papers' letters: N batch, C channels, (H, W) the map, (h, w) a partition, S sharesets, k branch kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

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
from repmlp_deploy.nets.blocks.checks import Check, Finding, parameter_checks
from repmlp_deploy.nets.blocks.conv_bn import ConvBN
from repmlp_deploy.nets.blocks.fc3 import (
    as_batch_norm,
    branches_of,
    fc3_terms,
    has_trained_fc3,
    partition_edges,
    stored_fc3,
    wrong_partition,
)
from repmlp_deploy.nets.blocks.protocol import Reparameterizable
from repmlp_deploy.nets.blocks.terms import MergedSum, Term, merged_checks

__all__ = ["FoldedBlock", "GlobalPerceptron", "RepMLPBlock"]


class GlobalPerceptron(nn.Module):
    """A gate per channel from the map's mean: σ(FC2(ReLU(FC1(avgpool(x))))), (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    @classmethod
    def from_parts(cls, fc1: nn.Conv2d, fc2: nn.Conv2d) -> Self:
        """Return one that holds these very modules."""
        with torch.device("meta"):  # the parts bring the memory
            made = cls(1, 1)
        made.fc1, made.fc2 = fc1, fc2
        return made

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3), keepdim=True)  # (N, C, H, W) -> (N, C, 1, 1)
        return torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))


class RepMLPBlock(Reparameterizable):
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

    branched = mergeable = exported_whole = True
    foreign_parts = ("gp",)

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

    @classmethod
    def from_parts(  # noqa: PLR0913 - what a block is made of
        cls,
        channels: int,
        partition: tuple[int, int],
        *,
        gp: nn.Module,
        fc3: nn.Conv2d,
        fc3_bn: nn.BatchNorm2d | None = None,
        branches: Mapping[int, ConvBN] | None = None,
    ) -> RepMLPBlock:
        """Return a block that holds these very modules.

        Args:
            channels: C.
            partition: (h, w).
            gp: the gate, (N, C, H, W) -> (N, C, 1, 1).
            fc3: its groups are the sharesets.
            fc3_bn: None for the merged form.
            branches: kernel k to branch; none for the merged form.
        """
        with torch.device("meta"):  # the parts bring the memory
            made = RepMLPBlock(channels, *partition, sharesets=fc3.groups, kernels=(), hidden=1, deploy=fc3_bn is None)
        made.gp, made.fc3, made.fc3_bn = gp, fc3, fc3_bn  # type: ignore[assignment]
        for k, branch in (branches or {}).items():
            made.add_module(f"repconv{k}", branch)
        made.kernels = tuple(branches or ())
        return made

    @classmethod
    def adopted(cls, foreign: nn.Module) -> RepMLPBlock | None:
        """Return the block of ours that shares the tensors and the gate of one of another package."""
        if not has_trained_fc3(foreign) or not hasattr(foreign, "gp"):
            return None
        parts: Any = foreign
        h, w = partition_edges(foreign)
        channels = next(m.in_channels for m in parts.gp.modules() if isinstance(m, nn.Conv2d))
        if parts.fc3.weight.shape[:2] != (parts.fc3.groups * h * w, h * w):
            raise ValueError(f"its fc3 has shape {tuple(parts.fc3.weight.shape)}, not that of {h}x{w} partitions")
        return RepMLPBlock.from_parts(
            channels,
            (h, w),
            gp=parts.gp,
            fc3=parts.fc3,
            fc3_bn=as_batch_norm(parts.fc3_bn),
            branches=branches_of(foreign),
        )

    def example_shapes(self) -> list[tuple[int, ...]]:
        """Return maps of several partitions, then of one, as a foreign block may accept no other."""
        return [(2, self.C, 2 * self.h, 3 * self.w), (2, self.C, self.h, self.w)]

    @property
    def deploy(self) -> bool:
        """Whether the branches are merged into FC3."""
        return self.fc3_bn is None

    def branches(self) -> list[ConvBN]:
        """Return the convolution branches, in the order of `kernels`."""
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
        """Apply FC3 to every row: (M, S, h·w) -> (M, S, h·w)."""
        if self.as_convolution:
            y: Tensor = self.fc3(rows.reshape(-1, self.S * self.h * self.w, 1, 1))
            return y.reshape(rows.shape)
        area = self.h * self.w
        weight = self.fc3.weight.view(self.S, area, area).transpose(1, 2)
        y = (rows.transpose(0, 1) @ weight).transpose(0, 1)  # (S, M, h·w) × (S, h·w, h·w)
        return y if self.fc3.bias is None else y + self.fc3.bias.view(self.S, area)

    def merged(self) -> RepMLPBlock:
        """Return the block with its branches and its BatchNorms absorbed into FC3."""
        made = RepMLPBlock.from_parts(self.C, (self.h, self.w), gp=self.gp, fc3=self.merged_fc3())
        made.as_convolution = self.as_convolution
        return made

    def folded(self) -> dict[nn.Module, nn.Module]:
        """Return the block whose FC3 is a batched product."""
        return {self: FoldedBlock(self)}

    def terms(self, group: int, columns: Tensor | None = None) -> list[Term]:
        """Return FC3 and the branches, for one group and some columns of it."""
        if self.fc3_bn is None:
            raise ValueError("the block is merged already: its terms are gone")
        return fc3_terms(self.fc3, self.fc3_bn, self.branches(), (self.h, self.w), group, columns)

    def merged_sum(self, made: nn.Module) -> MergedSum | None:
        """Return the matrices of a merged or folded FC3."""
        if isinstance(made, FoldedBlock):
            return MergedSum(
                made.weight.detach().transpose(1, 2),
                made.bias.detach(),
                name="fc3 transposed",
                partition=(self.h, self.w),
            )
        return stored_fc3(self.fc3, made.fc3, (self.h, self.w)) if isinstance(made, RepMLPBlock) else None

    def checks(self, made: nn.Module) -> Iterator[Check]:
        """Yield the checks of the gate, which is unchanged, and of FC3."""
        stored = None if self.deploy else self.merged_sum(made)
        if stored is None and self.deploy:
            yield from parameter_checks(self, made, "")
            return
        yield from parameter_checks(self.gp, made.get_submodule("gp"), "global perceptron")
        if stored is not None:
            yield from merged_checks(self, stored)

    def wrong_geometry(self, made: nn.Module) -> Finding | None:
        """Return what is wrong with the partition, whose edges no tensor shows."""
        return wrong_partition((self.h, self.w), made)

    def merged_fc3(self) -> nn.Conv2d:
        """Return FC3 with its BatchNorm and every branch absorbed, in FC3's dtype; see `nets.blocks.algebra`."""
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
        if block.fc3.bias is None:
            raise ValueError("a RepMLP block still has its branches: merge before folding")
        with torch.device("meta"):  # its parts come from `block`
            super().__init__(block.C, block.h, block.w, sharesets=block.S, kernels=(), hidden=1, deploy=True)
        del self.fc3
        self.gp = block.gp
        area = block.h * block.w
        self.weight = constant(block.fc3.weight.detach().view(self.S, area, area).transpose(1, 2).contiguous())
        self.bias = constant(block.fc3.bias.detach().view(self.S, area))

    def _apply_fc3(self, rows: Tensor) -> Tensor:
        return grouped_product(rows.flatten(1), self.weight).view(-1, *rows.shape[1:]) + self.bias
