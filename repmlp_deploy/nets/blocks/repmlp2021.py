"""The RepMLP block of 2021 (arXiv 2105.01883), parametrised and named as its checkpoints are.

Letters: N batch, C in-, O out-channels, (H, W) the map, (h, w) a partition, g groups, k branch kernel.

The map is cut into (h, w) partitions. A *global perceptron* lets them see each other: the mean of every channel in
every partition, normalised, passes two linear layers, and the result is added to the whole partition. It exists only
where there is more than one partition. FC3, the *partition perceptron*, then takes C·h·w values to O·h·w in g groups;
convolutions from C to O in as many groups run beside it while training.

Merging (section 3.2) absorbs the branches and `fc3_bn` into FC3, and the BatchNorm after the pool, p ↦ a p + b per
channel, into FC1, whose columns are (channel, partition): FC1(a p + b) = (FC1·diag(a)) p + (FC1 b + c₁).
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
from repmlp_deploy.nets.blocks.checks import Check, Finding, absorbed_checks, parameter_checks
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

__all__ = ["AddedPerceptron", "FoldedRepMLP", "PooledNorm", "RepMLP"]


class AddedPerceptron(nn.Module):
    """FC2(ReLU(FC1(v))), what is added to the partitions: (N, C·partitions) -> (N, C·partitions)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, features)

    @classmethod
    def from_parts(cls, fc1: nn.Linear, fc2: nn.Linear) -> Self:
        """Return one that holds these very modules."""
        with torch.device("meta"):  # the parts bring the memory
            made = cls(1, 1)
        made.fc1, made.fc2 = fc1, fc2
        return made

    def forward(self, v: Tensor) -> Tensor:
        added: Tensor = self.fc2(F.relu(self.fc1(v)))
        return added


class PooledNorm(nn.Module):
    """The BatchNorm after the average pool: (N, C, rows, columns) -> (N, C, rows, columns)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    @classmethod
    def from_parts(cls, bn: nn.BatchNorm2d) -> Self:
        """Return one that holds this very module."""
        with torch.device("meta"):  # the part brings the memory
            made = cls(1)
        made.bn = bn
        return made

    def forward(self, pooled: Tensor) -> Tensor:
        normal: Tensor = self.bn(pooled)
        return normal


class RepMLP(Reparameterizable):
    """The RepMLP block of 2021: (N, C, H, W) -> (N, O, H, W).

    FC3 is stored as the grouped 1×1 convolution of the release, but computed as the batched product it is; with
    `as_convolution` set it runs in the release's form, as a baseline.

    Args:
        in_channels: C.
        out_channels: O.
        map_size: (H, W).
        partition: (h, w); divides (H, W).
        groups: g, of FC3 and of every branch; divides C and O.
        kernels: odd branch kernels k; empty for none.
        reduction: C·partitions over the width of the global perceptron.
        deploy: build the merged form, FC3 with a bias and no BatchNorm or branch.

    Raises:
        ValueError: sizes that do not divide.
    """

    branched = mergeable = exported_whole = True

    def __init__(  # noqa: PLR0913 - the paper's hyper-parameters
        self,
        in_channels: int,
        out_channels: int,
        map_size: tuple[int, int],
        partition: tuple[int, int],
        *,
        groups: int = 1,
        kernels: Sequence[int] = (1, 3, 5),
        reduction: int = 1,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        (H, W), (h, w) = map_size, partition
        if H % h or W % w:
            raise ValueError(f"map is {H}x{W}; it must divide into {h}x{w} partitions")
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} to {out_channels} channels cannot have {groups} groups: it must divide")
        self.C, self.O, self.groups = in_channels, out_channels, groups
        self.H, self.W, self.h, self.w = H, W, h, w
        self.kernels = () if deploy else tuple(kernels)
        features = in_channels * (H // h) * (W // w)
        alone = partition == map_size
        self.fc1_fc2 = None if alone else AddedPerceptron(features, max(1, features // reduction))
        self.avg = None if alone or deploy else PooledNorm(in_channels)
        self.fc3 = nn.Conv2d(in_channels * h * w, out_channels * h * w, 1, groups=groups, bias=deploy)
        self.fc3_bn = None if deploy else nn.BatchNorm1d(out_channels * h * w)
        self.as_convolution = False
        for k in self.kernels:
            branch = ConvBN(in_channels, out_channels, k, padding=k // 2, groups=groups)
            self.add_module(f"repconv{k}", branch)

    @classmethod
    def from_parts(  # noqa: PLR0913 - what a block is made of
        cls,
        map_size: tuple[int, int],
        partition: tuple[int, int],
        *,
        fc1_fc2: AddedPerceptron | None,
        fc3: nn.Conv2d,
        avg: PooledNorm | None = None,
        fc3_bn: nn.BatchNorm1d | None = None,
        branches: Mapping[int, ConvBN] | None = None,
    ) -> RepMLP:
        """Return a block that holds these very modules.

        Args:
            map_size: (H, W).
            partition: (h, w).
            fc1_fc2: the global perceptron; None where there is one partition.
            fc3: of `groups` groups.
            avg: None for the merged form, and where there is one partition.
            fc3_bn: None for the merged form.
            branches: kernel k to branch; none for the merged form.
        """
        area = partition[0] * partition[1]
        C, O = fc3.in_channels // area, fc3.out_channels // area
        with torch.device("meta"):  # the parts bring the memory
            made = RepMLP(C, O, map_size, partition, groups=fc3.groups, kernels=(), deploy=fc3_bn is None)
        made.fc1_fc2, made.avg, made.fc3, made.fc3_bn = fc1_fc2, avg, fc3, fc3_bn
        for k, branch in (branches or {}).items():
            made.add_module(f"repconv{k}", branch)
        made.kernels = tuple(branches or ())
        return made

    @classmethod
    def adopted(cls, foreign: nn.Module) -> RepMLP | None:
        """Return the block of ours that shares the tensors of one of another package."""
        if not has_trained_fc3(foreign) or hasattr(foreign, "gp"):
            return None
        parts: Any = foreign
        partition, map_size = partition_edges(foreign), (int(parts.H), int(parts.W))
        perceptron = pooled = None
        if partition != map_size:
            perceptron = AddedPerceptron.from_parts(parts.fc1_fc2.fc1, parts.fc1_fc2.fc2)
            pooled = PooledNorm.from_parts(parts.avg.bn)
        return RepMLP.from_parts(
            map_size,
            partition,
            fc1_fc2=perceptron,
            avg=pooled,
            fc3=parts.fc3,
            fc3_bn=as_batch_norm(parts.fc3_bn, nn.BatchNorm1d),
            branches=branches_of(foreign),
        )

    def example_shapes(self) -> list[tuple[int, ...]]:
        """Return the only shape that the block takes."""
        return [(2, self.C, self.H, self.W)]

    @property
    def deploy(self) -> bool:
        """Whether the branches are merged into FC3."""
        return self.fc3_bn is None

    def branches(self) -> list[ConvBN]:
        """Return the convolution branches, in the order of `kernels`."""
        return [self.get_submodule(f"repconv{k}") for k in self.kernels]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        C, O, h, w = self.C, self.O, self.h, self.w
        if tuple(x.shape[1:]) != (C, self.H, self.W):
            raise ValueError(f"map is {tuple(x.shape)}; this RepMLP block takes (N, {C}, {self.H}, {self.W})")
        rows, columns = self.H // h, self.W // w
        cut = x.reshape(-1, C, rows, h, columns, w)
        if self.fc1_fc2 is not None:
            pooled = F.avg_pool2d(x, (h, w))  # (N, C, H, W) -> (N, C, rows, columns)
            if self.avg is not None:
                pooled = self.avg(pooled)
            added = self.fc1_fc2(pooled.reshape(-1, C * rows * columns))
            cut = cut + added.reshape(-1, C, rows, 1, columns, 1)
        partitions = cut.permute(0, 2, 4, 1, 3, 5)  # (N, rows, columns, C, h, w)
        y = self._apply_fc3(partitions.reshape(-1, C * h * w))
        if self.fc3_bn is not None:
            y = self.fc3_bn(y)
        y = y.reshape(-1, O, h, w)
        if self.kernels:
            windows = partitions.reshape(-1, C, h, w)
            for branch in self.branches():
                y = y + branch(windows)
        y = y.reshape(-1, rows, columns, O, h, w).permute(0, 3, 1, 4, 2, 5)  # (N, O, rows, h, columns, w)
        return y.reshape(-1, O, self.H, self.W)

    def _apply_fc3(self, rows: Tensor) -> Tensor:
        """Apply FC3 to every row: (M, C·h·w) -> (M, O·h·w)."""
        if self.as_convolution:
            return self.fc3(rows[:, :, None, None])[:, :, 0, 0]  # type: ignore[no-any-return]
        weight = self.fc3.weight.view(self.groups, -1, self.fc3.in_channels // self.groups).transpose(1, 2)
        y = grouped_product(rows, weight)
        return y if self.fc3.bias is None else y + self.fc3.bias

    def merged(self) -> RepMLP:
        """Return the block with its branches and its BatchNorms absorbed into FC3 and FC1."""
        made = RepMLP.from_parts(
            (self.H, self.W), (self.h, self.w), fc1_fc2=self.merged_perceptron(), fc3=self.merged_fc3()
        )
        made.as_convolution = self.as_convolution
        return made

    def folded(self) -> dict[nn.Module, nn.Module]:
        """Return the block whose FC3 is a batched product."""
        return {self: FoldedRepMLP(self)}

    def terms(self, group: int, columns: Tensor | None = None) -> list[Term]:
        """Return FC3 and the branches, for one group and some columns of it."""
        if self.fc3_bn is None:
            raise ValueError("the block is merged already: its terms are gone")
        return fc3_terms(self.fc3, self.fc3_bn, self.branches(), (self.h, self.w), group, columns)

    def merged_sum(self, made: nn.Module) -> MergedSum | None:
        """Return the matrices of a merged or folded FC3."""
        if isinstance(made, FoldedRepMLP):
            weight, bias = made.fc3.detach().transpose(1, 2), made.bias.detach()[:, 0]
            return MergedSum(weight, bias, name="fc3 transposed", partition=(self.h, self.w))
        return stored_fc3(self.fc3, made.fc3, (self.h, self.w)) if isinstance(made, RepMLP) else None

    def checks(self, made: nn.Module) -> Iterator[Check]:
        """Yield the checks of the global perceptron and of FC3."""
        if self.deploy or not isinstance(made, RepMLP | FoldedRepMLP):
            yield from parameter_checks(self, made, "")
            return
        if made.fc1_fc2 is not None:
            yield from self._perceptron_checks(made.fc1_fc2)
        stored = self.merged_sum(made)
        if stored is not None:
            yield from merged_checks(self, stored)

    def _perceptron_checks(self, made: AddedPerceptron) -> Iterator[Check]:
        """Yield the checks of the global perceptron, which absorbed the BatchNorm after its pool."""
        if self.fc1_fc2 is None:
            return
        fc1, part = self.fc1_fc2.fc1, "global perceptron"
        if self.avg is not None:

            def values(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
                weight = fc1.weight.detach().double()
                a, b = (each.repeat_interleave(fc1.in_features // self.C) for each in (a, b))
                return weight * a, fc1.bias.detach().double() + weight @ b

            stored = [("fc1_fc2.fc1.weight", made.fc1.weight), ("fc1_fc2.fc1.bias", made.fc1.bias)]
            yield from absorbed_checks(part, self.avg.bn, values, stored)
        else:
            yield from parameter_checks(fc1, made.fc1, part)
        yield from parameter_checks(self.fc1_fc2.fc2, made.fc2, part)

    def wrong_geometry(self, made: nn.Module) -> Finding | None:
        """Return what is wrong with the partition, whose edges no tensor shows."""
        return wrong_partition((self.h, self.w), made)

    def merged_fc3(self) -> nn.Conv2d:
        """Return FC3 with its BatchNorm and every branch absorbed, in FC3's dtype; see `nets.blocks.algebra`."""
        if self.fc3_bn is None:
            raise ValueError("this RepMLP block is merged already")
        C, O, g, h, w = self.C, self.O, self.groups, self.h, self.w
        scale, shift = affine_of_batch_norm(self.fc3_bn)  # (O·h·w,)
        kernels = []
        for branch in self.branches():
            branch_scale, branch_shift = affine_of_batch_norm(branch.bn)
            kernels.append(branch.conv.weight.detach().double() * branch_scale[:, None, None, None])  # (O, C/g, k, k)
            shift = shift + branch_shift.repeat_interleave(h * w)
        weight = scale_rows(self.fc3.weight.detach().reshape(O * h * w, C // g * h * w), scale)
        kernel = sum_kernels(kernels)
        if kernel is not None:
            shape, order = (g, O // g, h, w, C // g, h, w), (0, 1, 4, 2, 3, 5, 6)
            set_convolution(
                weight.view(shape).permute(order),  # (g, O/g, C/g, h, w, h, w)
                self.fc3.weight.detach().reshape(shape).permute(order),
                scale.view(g, O // g, 1, h, w),
                kernel.view(g, O // g, C // g, *kernel.shape[-2:]),
            )
        merged = nn.Conv2d(C * h * w, O * h * w, 1, groups=g, bias=True, device="meta", dtype=weight.dtype)
        merged.weight = nn.Parameter(weight.view_as(self.fc3.weight), requires_grad=False)
        merged.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
        return merged

    def merged_perceptron(self) -> AddedPerceptron | None:
        """Return the global perceptron with the BatchNorm after the pool absorbed into FC1; None if there is none."""
        if self.fc1_fc2 is None or self.avg is None:
            return self.fc1_fc2
        fc1 = self.fc1_fc2.fc1
        a, b = (each.repeat_interleave(fc1.in_features // self.C) for each in affine_of_batch_norm(self.avg.bn))
        weight = fc1.weight.detach().double()
        first = nn.Linear(fc1.in_features, fc1.out_features, device="meta")
        first.weight = constant((weight * a).to(fc1.weight.dtype))
        first.bias = constant((fc1.bias.detach() + weight @ b).to(fc1.weight.dtype))
        return AddedPerceptron.from_parts(first, self.fc1_fc2.fc2)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Merge in place; merging twice changes nothing."""
        if self.deploy:
            return
        self.fc3, self.fc1_fc2 = self.merged_fc3(), self.merged_perceptron()
        self.fc3_bn = self.avg = None
        for k in self.kernels:
            delattr(self, f"repconv{k}")
        self.kernels = ()


class FoldedRepMLP(Reparameterizable):
    """A merged RepMLP block of 2021: (N, C, H, W) -> (N, O, H, W); letters as in the module's text.

    Cutting into partitions and sharing channels out to groups are one permutation here, and so are their inverses.
    Holds `fc3`, every group's matrix transposed, (g, C/g·h·w, O/g·h·w), and `bias`, (g, 1, O/g·h·w).
    """

    exported_whole = True

    def __init__(self, block: RepMLP) -> None:
        super().__init__()
        if block.fc3.bias is None:
            raise ValueError("a RepMLP block still has its branches: merge before folding")
        self.C, self.O, self.g = block.C, block.O, block.groups
        self.H, self.W, self.h, self.w = block.H, block.W, block.h, block.w
        matrix = block.fc3.weight.detach().view(self.g, -1, block.fc3.in_channels // self.g)
        self.fc1_fc2 = block.fc1_fc2
        self.fc3 = constant(matrix.transpose(1, 2).contiguous())
        self.bias = constant(block.fc3.bias.detach().view(self.g, 1, -1))

    def forward(self, x: Tensor) -> Tensor:
        g, C, O, h, w = self.g, self.C, self.O, self.h, self.w
        rows, columns = self.H // h, self.W // w
        cut = x.reshape(-1, g, C // g, rows, h, columns, w)
        if self.fc1_fc2 is not None:
            pooled = F.avg_pool2d(x, (h, w))  # (N, C, H, W) -> (N, C, rows, columns)
            added = self.fc1_fc2(pooled.reshape(-1, C * rows * columns))
            cut = cut + added.reshape(-1, g, C // g, rows, 1, columns, 1)
        cut = cut.permute(1, 0, 3, 5, 2, 4, 6).contiguous()  # (g, N, rows, columns, C/g, h, w)
        y = cut.reshape(g, -1, C // g * h * w) @ self.fc3 + self.bias  # (g, N·partitions, O/g·h·w)
        y = y.reshape(g, -1, rows, columns, O // g, h, w)
        return y.permute(1, 0, 4, 2, 5, 3, 6).contiguous().view(-1, O, self.H, self.W)
