"""RepVGG and MobileOne as their repositories and mmpretrain name the parts: written for these tests from the papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.networks import randomize


@dataclass(frozen=True)
class Names:
    """What an implementation calls the parts of a network and of its blocks.

    Attributes:
        stem: the first block.
        stage: of the number n, with `{n}` in it; from 1.
        head: the classifier.
        dense: the convolutions of the block's size; a list of them where it ends in a dot.
        scale: the 1×1 convolution.
        identity: the BatchNorm of the input.
        norm: the BatchNorm of a convolution.
        excite: the squeeze-and-excitation's two layers.
        backbone: what all but the head lies in; empty for none.
    """

    stem: str
    stage: str
    head: str
    dense: str
    scale: str
    identity: str
    norm: str
    excite: tuple[str, str]
    backbone: str = ""


REPVGG = Names("stage0", "stage{n}", "linear", "rbr_dense", "rbr_1x1", "rbr_identity", "bn", ("se.down", "se.up"))
MOBILEONE = Names(
    "stage0", "stage{n}", "linear", "rbr_conv.", "rbr_scale", "rbr_skip", "bn", ("se.reduce", "se.expand")
)
MM_REPVGG = Names(
    "stem",
    "stage_{n}",
    "head.fc",
    "branch_3x3",
    "branch_1x1",
    "branch_norm",
    "norm",
    ("se_layer.conv1.conv", "se_layer.conv2.conv"),
    "backbone",
)
MM_MOBILEONE = Names(
    "stage0",
    "stage{n}",
    "head.fc",
    "branch_conv_list.",
    "branch_scale",
    "branch_norm",
    "norm",
    ("se.conv1.conv", "se.conv2.conv"),
    "backbone",
)


def _put(parent: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """Place a module under a name with dots, and return it."""
    first, _, rest = name.partition(".")
    if not rest:
        parent.add_module(first, child)
        return child
    if first not in dict(parent.named_children()):
        parent.add_module(first, nn.Module())
    return _put(parent.get_submodule(first), rest, child)


class Block(nn.Module):
    """(N, C, H, W) -> (N, O, H/stride, W/stride): branches of convolutions and the identity, each with a BatchNorm."""

    def __init__(  # noqa: PLR0913 - as the papers have it
        self,
        names: Names,
        c: int,
        o: int,
        size: int = 3,
        stride: int = 1,
        groups: int = 1,
        dense: int = 1,
        reduced: int = 0,
    ) -> None:
        super().__init__()
        self.names, self.branches, self.excites = names, [], bool(reduced)
        listed = names.dense.endswith(".")
        sizes = {f"{names.dense}{i}" if listed else names.dense: size for i in range(dense)}
        if size > 1:
            sizes[names.scale] = 1
        for name, k in sizes.items():
            conv = nn.Conv2d(c, o, k, stride, k // 2, groups=groups, bias=False)
            branch = nn.Sequential()
            branch.add_module("conv", conv)
            branch.add_module(names.norm, nn.BatchNorm2d(o))
            self.branches.append(_put(self, name, branch).forward)
        if c == o and stride == 1:
            self.branches.append(_put(self, names.identity, nn.BatchNorm2d(o)).forward)
        if reduced:
            down, up = names.excite
            _put(self, down, nn.Conv2d(o, reduced, 1))
            _put(self, up, nn.Conv2d(reduced, o, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = sum(branch(x) for branch in self.branches)
        if self.excites:
            down, up = (self.get_submodule(name) for name in self.names.excite)
            y = y * torch.sigmoid(up(F.relu(down(y.mean((2, 3), keepdim=True)))))
        return F.relu(y)


class Network(nn.Module):
    """(N, 3, H, W) -> (N, classes): a stem, four stages and a linear layer on the mean."""

    def __init__(self, names: Names, stem: Block, stages: Sequence[Sequence[Block]], width: int, classes: int) -> None:
        super().__init__()
        where = f"{names.backbone}." if names.backbone else ""
        self.steps = [_put(self, f"{where}{names.stem}", stem).forward]
        for n, blocks in enumerate(stages, 1):
            self.steps.append(_put(self, where + names.stage.format(n=n), nn.Sequential(*blocks)).forward)
        self.last = _put(self, names.head, nn.Linear(width, classes)).forward

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.last(x.mean((2, 3)))


def make_repvgg(
    names: Names = REPVGG,
    depths: Sequence[int] = (2, 4, 14, 1),
    widths: Sequence[int] = (48, 96, 192, 1280),
    *,
    excited: bool = False,
    classes: int = 1000,
) -> nn.Module:
    """Return a RepVGG, by default A0, with BatchNorms far from the identity."""
    torch.manual_seed(0)
    stem = min(64, widths[0])

    def block(c: int, o: int, stride: int) -> Block:
        return Block(names, c, o, stride=stride, reduced=o // 16 if excited else 0)

    stages, c = [], stem
    for depth, width in zip(depths, widths, strict=True):
        stages.append([block(width if i else c, width, 1 if i else 2) for i in range(depth)])
        c = width
    return randomize(Network(names, block(3, stem, 2), stages, c, classes))


def make_mobileone(
    names: Names = MOBILEONE,
    widths: Sequence[int] = (48, 128, 256, 1024),
    dense: int = 4,
    excited: Mapping[int, int] = {},
) -> nn.Module:
    """Return a MobileOne, by default S0; `excited` is the number of a stage to how many of its last units have SE."""
    torch.manual_seed(0)
    stages, c = [], min(64, widths[0])
    stem = Block(names, 3, c, stride=2)
    for n, (depth, width) in enumerate(zip((2, 8, 10, 1), widths, strict=True)):
        blocks = []
        for i in range(depth):
            se = i >= depth - excited.get(n, 0)
            blocks += [
                Block(names, c, c, stride=1 if i else 2, groups=c, dense=dense, reduced=c // 16 if se else 0),
                Block(names, c, width, 1, dense=dense, reduced=width // 16 if se else 0),
            ]
            c = width
        stages.append(blocks)
    return randomize(Network(names, stem, stages, c, 1000))
