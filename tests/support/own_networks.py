"""Networks of a user's own, with blocks of several origins inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from repmlp_deploy.nets.blocks.repmlp2022 import RepMLPBlock
from support.foreign_blocks import Block2022, MmpretrainBlock


class Segmenter(nn.Module):
    """A pyramid-pooling network: blocks of three origins, a frozen weight a class as second input, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.one = RepMLPBlock(8, 8, 8, sharesets=4, hidden=4)
        self.two = MmpretrainBlock(8, 4, 4, 2, (1, 3), 4)
        self.down = nn.Conv2d(8, 12, 2, stride=2)
        self.three = RepMLP(12, 12, (4, 4), (2, 2), groups=3, kernels=(1, 3), reduction=2)
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(k), nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            for k in (1, 2)
        )
        self.head = nn.Conv2d(12 + 2 * 4 + 8, 5, 1)
        self.auxiliary = nn.Linear(12, 7)

    def forward(self, images: Tensor, weight: Tensor) -> dict[str, Any]:
        fine = self.two(self.one(self.stem(images)))
        coarse = self.three(self.down(fine))
        pooled = [F.interpolate(pool(coarse), size=coarse.shape[2:], mode="bilinear") for pool in self.pools]
        pyramid = F.interpolate(torch.cat([coarse, *pooled], 1), size=fine.shape[2:], mode="bilinear")
        classes = self.head(torch.cat([pyramid, fine], 1)) * weight[:, :, None, None]
        return {
            "segmentation": F.interpolate(classes, size=images.shape[2:], mode="bilinear"),
            "auxiliary": self.auxiliary(coarse.mean((2, 3))),
            "maps": (fine, coarse),
        }


class Scorer(nn.Module):
    """One tensor in, one out; what a factory makes."""

    example_input = torch.zeros(1, 3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(3))
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.block = Block2022(4, 4, 4, 2, (1, 3), 2)
        self.fc3 = nn.Linear(4, 2)  # a name that our blocks use too

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.block(self.stem(x)).mean((2, 3)))


class ByPosition(nn.Module):
    """Two inputs that have no names."""

    example_input = (torch.zeros(1, 3, 6, 6), torch.zeros(1, 3, 6, 6))

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 2, 3)
        self.right = nn.Conv2d(3, 2, 3)

    def forward(self, *both: Tensor) -> Tensor:
        return self.left(both[0]) - self.right(both[1])


class PositionOnly(ByPosition):
    """Two inputs whose names cannot be used."""

    def forward(self, a: Tensor, b: Tensor, /) -> Tensor:
        return super().forward(a, b)


class NameOnly(nn.Module):
    """One input that is passed by name."""

    example_input: Any = {"x": torch.zeros(1, 3, 6, 6)}  # noqa: RUF012 - as users write it

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.conv(x)


class WithGap(NameOnly):
    """Two inputs by name, and a parameter between them that is left out."""

    example_input: Any = {"x": torch.zeros(1, 3, 6, 6), "shift": torch.zeros(1, 2)}  # noqa: RUF012 - as users write it

    def forward(self, x: Tensor, scale: float = 2.0, shift: Tensor | None = None) -> Tensor:
        y = super().forward(x=x) * scale
        return y if shift is None else y + shift[:, :, None, None]


class Tied(nn.Module):
    """Two layers with one weight."""

    example_input = torch.zeros(1, 4)

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.back.weight = self.there.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.back(F.relu(self.there(x)))


def make_nothing() -> nn.Module:
    """Fail as a factory may."""
    raise KeyError("no weights here")
