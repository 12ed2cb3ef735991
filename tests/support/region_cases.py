"""Small networks with regions of every kind, for the tests of region merging."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.networks import randomize

__all__ = ["CASES", "Case", "Parallel", "conv_norm"]


def conv_norm(  # noqa: PLR0913 - a convolution has that many numbers
    c: int, o: int, k: int = 3, *, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Return a convolution that keeps the size, and its BatchNorm."""
    padding = dilation * (k - 1) // 2
    conv = nn.Conv2d(c, o, k, stride, padding, dilation=dilation, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o))


class Parallel(nn.Module):
    """The sum of its branches, and a ReLU."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        self.names = tuple(branches)
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(sum((getattr(self, name)(x) for name in self.names[1:]), getattr(self, self.names[0])(x)))


class Residual(nn.Module):
    """x + scale·(mixer(x) − norm(x)), as FastViT has it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(c)
        self.mixer = Parallel(
            wide=conv_norm(c, c, groups=c), point=conv_norm(c, c, 1, groups=c), skip=nn.BatchNorm2d(c)
        )
        self.mixer.forward = self._mixed
        self.scale = nn.Parameter(torch.linspace(-1, 1, c)[:, None, None])

    def _mixed(self, x: Tensor) -> Tensor:
        return self.mixer.wide(x) + self.mixer.point(x) + self.mixer.skip(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * (self.mixer(x) - self.norm(x))


class Attention(nn.Module):
    """Projections whose BatchNorms come after a reshape, as LeViT has them, and a head after a mean."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(c, 3 * c, bias=False), nn.BatchNorm1d(3 * c)
        self.last, self.head = nn.BatchNorm1d(c), nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y = self.qkv(tokens)
        q, k, v = self.norm(y.flatten(0, 1)).reshape_as(y).chunk(3, -1)
        mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.head(self.last(mixed.mean(1)))


class NormBeforeMean(nn.Module):
    """A BatchNorm that can go through a global mean into the head."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(c), nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.norm(F.relu(x)), 1).flatten(1))


class SharedNorm(nn.Module):
    """A BatchNorm that two convolutions read: both absorb it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(c)
        self.one, self.two = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return F.relu(self.one(y)) * F.relu(self.two(y))


class PoolWithoutBorder(nn.Module):
    """An average that leaves the border out of its count: no convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.pool, self.conv = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(c, c, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.pool(x))


@dataclass(frozen=True)
class Case:
    """A network and what merging leaves of it.

    Attributes:
        make: the network, for maps (3 or 4 or 6, 9, 8).
        channels: of its input.
        products: convolutions and linear layers before and after, products of two values included.
        additions: before and after.
    """

    make: Callable[[], nn.Module]
    channels: int
    products: tuple[int, int]
    additions: tuple[int, int]

    def network(self) -> nn.Module:
        """Return it with BatchNorms far from the identity, float64."""
        torch.manual_seed(0)
        return randomize(self.make()).double()

    def inputs(self, samples: int = 2) -> Tensor:
        """Return inputs, float64."""
        return torch.randn(
            samples, self.channels, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )


def _pooled(c: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, o, 1, bias=False), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(o))


CASES = {
    "repvgg": Case(
        lambda: Parallel(dense=conv_norm(4, 4), point=conv_norm(4, 4, 1), skip=nn.BatchNorm2d(4)), 4, (2, 1), (2, 0)
    ),
    "repvgg, stride 2": Case(
        lambda: Parallel(dense=conv_norm(4, 6, stride=2), point=conv_norm(4, 6, 1, stride=2)), 4, (2, 1), (1, 0)
    ),
    "asymmetric kernels": Case(
        lambda: Parallel(
            square=conv_norm(4, 4),
            tall=nn.Sequential(nn.Conv2d(4, 4, (3, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(4)),
            flat=nn.Sequential(nn.Conv2d(4, 4, (1, 3), padding=(0, 1), bias=False), nn.BatchNorm2d(4)),
        ),
        4,
        (3, 1),
        (2, 0),
    ),
    "dilated depthwise": Case(
        lambda: Parallel(
            large=conv_norm(4, 4, 7, groups=4),
            far=conv_norm(4, 4, 3, groups=4, dilation=3),
            near=conv_norm(4, 4, 5, groups=4),
        ),
        4,
        (3, 1),
        (2, 0),
    ),
    "groups of two sizes": Case(
        lambda: Parallel(dense=conv_norm(6, 6), two=conv_norm(6, 6, groups=2), three=conv_norm(6, 6, groups=3)),
        6,
        (3, 1),
        (2, 0),
    ),
    "average pool beside a dense branch": Case(
        lambda: Parallel(dense=conv_norm(4, 4), pooled=_pooled(4, 4)), 4, (2, 1), (1, 0)
    ),
    "residual": Case(lambda: Residual(4), 4, (2, 1), (4, 0)),
    "attention": Case(lambda: Attention(4), 4, (4, 4), (0, 0)),
    "norm before a mean": Case(lambda: NormBeforeMean(4), 4, (1, 1), (0, 0)),
    "norm with two readers": Case(lambda: SharedNorm(4), 4, (2, 2), (0, 0)),
    "average that does not count the border": Case(lambda: PoolWithoutBorder(4), 4, (1, 1), (1, 1)),
    "bias through padding": Case(
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU()),
        4,
        (1, 1),
        (0, 1),
    ),
    "nothing": Case(lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()), 4, (1, 1), (0, 0)),
}
