"""RepMLP blocks as other packages structure them: the official releases' names, and mmpretrain's."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


def conv_bn(*sizes: int, padding: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(*sizes, padding=padding, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(sizes[1])))


def cut(x: Tensor, h: int, w: int) -> Tensor:
    n, c, height, width = x.shape
    return x.reshape(n, c, height // h, h, width // w, w).permute(0, 2, 4, 1, 3, 5)


class OfficialGate(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class MmpretrainGate(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, hidden, 1), activate=nn.ReLU()))
        self.conv2 = nn.Sequential(OrderedDict(conv=nn.Conv2d(hidden, channels, 1), activate=nn.Sigmoid()))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x.mean((2, 3), keepdim=True)))


class Block2022(nn.Module):
    """The block of 2022; `edges` are the names of the partition's edges."""

    gate: type[nn.Module] = OfficialGate
    edges = ("h", "w")

    def __init__(  # noqa: PLR0913 - the paper's hyper-parameters
        self, channels: int, h: int, w: int, sharesets: int, kernels: tuple[int, ...], hidden: int
    ) -> None:
        super().__init__()
        for name, edge in zip(self.edges, (h, w), strict=True):
            setattr(self, name, edge)
        self.sharesets, self.kernel_sizes = sharesets, kernels
        self.gp = self.gate(channels, hidden)
        self.fc3 = nn.Conv2d(sharesets * h * w, sharesets * h * w, 1, groups=sharesets, bias=False)
        self.fc3_bn = nn.BatchNorm2d(sharesets)
        for k in kernels:
            setattr(self, f"repconv{k}", conv_bn(sharesets, sharesets, k, padding=k // 2, groups=sharesets))

    def forward(self, x: Tensor) -> Tensor:
        h, w = (getattr(self, name) for name in self.edges)
        S, rows, columns = self.sharesets, x.shape[2] // h, x.shape[3] // w
        windows = cut(x, h, w).reshape(-1, S, h, w)
        y = self.fc3_bn(self.fc3(windows.reshape(-1, S * h * w, 1, 1)).reshape(-1, S, h, w))
        for k in self.kernel_sizes:
            y = y + getattr(self, f"repconv{k}")(windows)
        y = y.reshape(-1, rows, columns, S, h, w).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(x.shape) * self.gp(x)


class MmpretrainBlock(Block2022):
    gate = MmpretrainGate
    edges = ("path_h", "path_w")


class WrongBlock(Block2022):
    """The structure of a block with arithmetic of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * x


class Block2021(nn.Module):
    def __init__(  # noqa: PLR0913 - the paper's hyper-parameters
        self,
        in_channels: int,
        out_channels: int,
        map_size: tuple[int, int],
        partition: tuple[int, int],
        kernels: tuple[int, ...],
        groups: int,
        reduction: int,
    ) -> None:
        super().__init__()
        (self.H, self.W), (self.h, self.w) = map_size, partition
        self.outputs, self.kernel_sizes, area = out_channels, kernels, partition[0] * partition[1]
        features = in_channels * (self.H // self.h) * (self.W // self.w)
        if map_size != partition:
            parts = OrderedDict(
                fc1=nn.Linear(features, features // reduction),
                relu=nn.ReLU(),
                fc2=nn.Linear(features // reduction, features),
            )
            self.fc1_fc2 = nn.Sequential(parts)
            self.avg = nn.Sequential(OrderedDict(avg=nn.AvgPool2d(partition), bn=nn.BatchNorm2d(in_channels)))
        self.fc3 = nn.Conv2d(in_channels * area, out_channels * area, 1, groups=groups, bias=False)
        self.fc3_bn = nn.BatchNorm1d(out_channels * area)
        for k in kernels:
            setattr(self, f"repconv{k}", conv_bn(in_channels, out_channels, k, padding=k // 2, groups=groups))

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.shape
        h, w, rows, columns = self.h, self.w, self.H // self.h, self.W // self.w
        if rows * columns > 1:
            added = self.fc1_fc2(self.avg(x).reshape(n, -1)).reshape(n, c, rows, 1, columns, 1)
            x = (x.reshape(n, c, rows, h, columns, w) + added).reshape(x.shape)
        windows = cut(x, h, w).reshape(-1, c, h, w)
        y = self.fc3_bn(self.fc3(windows.reshape(-1, c * h * w, 1, 1)).flatten(1)).reshape(-1, self.outputs, h, w)
        for k in self.kernel_sizes:
            y = y + getattr(self, f"repconv{k}")(windows)
        y = y.reshape(n, rows, columns, self.outputs, h, w).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(n, self.outputs, self.H, self.W)
