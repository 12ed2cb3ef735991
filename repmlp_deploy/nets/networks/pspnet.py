"""PSPNet on a RepMLP backbone: semantic segmentation, a class for every pixel.

Published: the head is that of PSPNet (arXiv 1612.01105, section 3.2): the map is averaged over 1, 4, 9 and 36 regions,
each average is narrowed by a 1×1 convolution, enlarged to the map again and stacked beside it; a 3×3 convolution and
a 1×1 classifier follow. RepMLP (arXiv 2105.01883) puts it on a RepMLP-ResNet-50 for Cityscapes.
Our choice: the backbone here is a RepMLPNet (CVPR 2022) and the head reads its last map, 1/32 of the input; the logits
are enlarged to the input's size inside the network; the auxiliary head, which only training uses, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.conv_bn import ConvBN
from repmlp_deploy.nets.networks.bounds import Count, Counts
from repmlp_deploy.nets.networks.repmlpnet import RepMLPTrunk, RepMLPTrunkSpec, infer_trunk
from repmlp_deploy.nets.surgery import switch_blocks

__all__ = ["PSPHead", "PSPNet", "PSPNetSpec", "build_pspnet", "infer_pspnet"]


class PSPNetSpec(RepMLPTrunkSpec):
    """Hyper-parameters of a PSPNet on a RepMLPNet.

    Attributes:
        bins: regions an edge is cut into, one pooling each; at most the edges of the last map.
        hidden: width of the head.
        classes: what a pixel can be.
    """

    bins: Counts = (1, 2, 3, 6)
    hidden: Count = 512
    classes: Annotated[int, Field(gt=1)] = 19

    @model_validator(mode="after")
    def _bins_fit_the_map(self) -> PSPNetSpec:
        if len(set(self.bins)) != len(self.bins) or max(self.bins, default=0) > min(self.maps()[-1]):
            h, w = self.maps()[-1]
            raise ValueError(f"bins are {self.bins}; expected different numbers of at most the last map's {h}x{w}")
        return self


class PSPHead(nn.Module):
    """PSPNet's head on any one map: (N, C, h, w) -> (N, classes, h, w) logits.

    Args:
        channels: C.
        hidden: width after the stacked maps; every pooling is narrowed to C over the number of poolings.
        bins: regions an edge is cut into.
        classes: width of the classifier.
    """

    def __init__(self, channels: int, *, hidden: int, bins: Sequence[int], classes: int) -> None:
        super().__init__()
        self.bins = tuple(bins)
        narrow = max(1, channels // max(1, len(self.bins)))
        for n in self.bins:
            self.add_module(f"pool{n}", ConvBN(channels, narrow, 1, relu=True))
        stacked = channels + narrow * len(self.bins)
        self.bottleneck = ConvBN(stacked, hidden, 3, padding=1, relu=True)
        self.classifier = nn.Conv2d(hidden, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        stacked = [x]
        for n in self.bins:
            narrowed = self.get_submodule(f"pool{n}")(_pooled(x, n))  # (N, C, h, w) -> (N, C/bins, n, n)
            stacked.append(F.interpolate(narrowed, size, mode="bilinear", align_corners=False))
        logits: Tensor = self.classifier(self.bottleneck(torch.cat(stacked, dim=1)))
        return logits


class PSPNet(nn.Module):
    """A backbone and PSPNet's head: (N, 3, H, W) float -> (N, classes, H, W) logits.

    Args:
        backbone: any module of one (N, C, h, w) map.
        head: what makes logits of it.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.backbone(x))
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)  # (h, w) -> (H, W)

    def switch_to_deploy(self) -> None:
        """Merge every block in place; `merge_branches` leaves its input untouched."""
        switch_blocks(self)


def build_pspnet(spec: PSPNetSpec, *, deploy: bool = False) -> PSPNet:
    """Build the PSPNet of these hyper-parameters, with fresh weights."""
    head = PSPHead(spec.channels[-1], hidden=spec.hidden, bins=spec.bins, classes=spec.classes)
    return PSPNet(RepMLPTrunk(spec, deploy=deploy), head)


def infer_pspnet(shapes: Mapping[str, Sequence[int]], input_size: tuple[int, int] | None) -> PSPNetSpec:
    """Infer the hyper-parameters of a PSPNet from the keys and shapes of its state dict; see `infer_trunk`."""
    trunk = infer_trunk(
        {key.removeprefix("backbone."): shape for key, shape in shapes.items() if key.startswith("backbone.")},
        input_size,
    )
    ends = "head.pool", ".conv.weight"
    bins = [
        int(key[len(ends[0]) : -len(ends[1])]) for key in shapes if key.startswith(ends[0]) and key.endswith(ends[1])
    ]
    return PSPNetSpec(
        **trunk.model_dump(),
        bins=tuple(sorted(bins)),
        hidden=shapes["head.bottleneck.conv.weight"][0],
        classes=shapes["head.classifier.weight"][0],
    )


def _pooled(x: Tensor, n: int) -> Tensor:
    """Return the means of n×n regions that cover the map, (N, C, h, w) -> (N, C, n, n), like adaptive average pooling.

    Region i of an edge begins at ⌊i·edge/n⌋ and ends before ⌈(i+1)·edge/n⌉; where n divides the edge this is plain
    average pooling. The mean of a rectangle is the mean of its rows' means, so the edges are taken one after another.
    """
    for axis in (2, 3):
        edge = x.shape[axis]
        regions = [(i * edge // n, -(-(i + 1) * edge // n)) for i in range(n)]
        means = [x.narrow(axis, start, end - start).mean(dim=axis, keepdim=True) for start, end in regions]
        x = torch.cat(means, dim=axis)
    return x
