"""RepMLP-Res50 of 2021 (arXiv 2105.01883, section 4.3): a ResNet-50 with RepMLP blocks in its second and third stage.

A bottleneck of a ResNet is conv1 1×1, conv2 3×3, conv3 1×1, each with a BatchNorm, and a shortcut. Every unit of stages
2 and 3 but the first, which strides, is one of

    light:       1×1 to C/8, RepMLP, ReLU, 1×1 to C;
    bottleneck:  1×1 to C/4, 3×3 to C/(4 r), RepMLP, ReLU, 3×3 to C/4, 1×1 to C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from repmlp_deploy.nets.blocks.conv_bn import MergeableConvBN
from repmlp_deploy.nets.blocks.repmlp2021 import RepMLP
from repmlp_deploy.nets.networks.bounds import Count, Counts
from repmlp_deploy.nets.networks.input_size import require_input
from repmlp_deploy.nets.networks.shapes import count_layers, partition_of, read_block, square_input
from repmlp_deploy.nets.surgery import switch_blocks

__all__ = ["BottleneckUnit", "LightUnit", "RepMLPResNet", "RepMLPResNetSpec", "ResNetUnit", "infer_repmlp_resnet"]

Four = tuple[Count, Count, Count, Count]

_STRIDE_BEFORE = 4  # of the stem: a strided convolution, a strided pool
_REPMLP_STAGES = (1, 2)  # counted from 0; the papers count from 1


class RepMLPResNetSpec(BaseModel):
    """Hyper-parameters of a RepMLP-ResNet; `depths` and `channels` have one entry per stage.

    Attributes:
        input_size: (H, W) of the images; part of the model, as FC3 is tied to positions. Multiples of 16.
        block: what replaces the bottlenecks of stages 2 and 3.
        depths: units.
        channels: C, after each stage.
        stem: channels after the first convolution.
        partition: (h, w) of every RepMLP block.
        groups: of FC3 and its branches.
        kernels: branch kernels k, odd.
        reduction: inputs of the global perceptron over its width.
        squeeze: r of the bottleneck block, for stages 2 and 3.
        in_channels: 3 for RGB.
        classes: width of the head.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_size: tuple[Count, Count]
    block: Literal["light", "bottleneck"]
    depths: Four = (3, 4, 6, 3)
    channels: Four = (256, 512, 1024, 2048)
    stem: Count = 64
    partition: tuple[Count, Count] = (7, 7)
    groups: Count
    kernels: Counts = (1, 3, 5)
    reduction: Count = 1
    squeeze: tuple[Count, Count] = (2, 4)
    in_channels: Count = 3
    classes: Count = 1000


class ResNetUnit(nn.Module):
    """The bottleneck of a ResNet: (N, C, H, W) -> (N, C', H/stride, W/stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, deploy: bool) -> None:
        super().__init__()
        middle = channels // 4
        self.shortcut = _shortcut(in_channels, channels, stride, deploy=deploy)
        self.conv1 = MergeableConvBN(in_channels, middle, 1, relu=True, deploy=deploy)
        self.conv2 = MergeableConvBN(middle, middle, 3, stride=stride, relu=True, deploy=deploy)
        self.conv3 = MergeableConvBN(middle, channels, 1, deploy=deploy)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class LightUnit(nn.Module):
    """The RepMLP light block around `repmlp`: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, repmlp: RepMLP, *, deploy: bool) -> None:
        super().__init__()
        self.light_conv1 = MergeableConvBN(channels, repmlp.C, 1, relu=True, deploy=deploy)
        self.light_repmlp = repmlp
        self.light_conv3 = MergeableConvBN(repmlp.O, channels, 1, deploy=deploy)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.light_repmlp(self.light_conv1(x)))
        return F.relu(self.light_conv3(y) + x)


class BottleneckUnit(nn.Module):
    """The RepMLP bottleneck block around `repmlp`: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, repmlp: RepMLP, *, deploy: bool) -> None:
        super().__init__()
        middle = channels // 4
        self.btnk_conv1 = MergeableConvBN(channels, middle, 1, relu=True, deploy=deploy)
        self.btnk_conv2 = MergeableConvBN(middle, repmlp.C, 3, relu=True, deploy=deploy)
        self.btnk_repmlp = repmlp
        self.btnk_conv4 = MergeableConvBN(repmlp.O, middle, 3, relu=True, deploy=deploy)
        self.btnk_conv5 = MergeableConvBN(middle, channels, 1, deploy=deploy)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.btnk_repmlp(self.btnk_conv2(self.btnk_conv1(x))))
        return F.relu(self.btnk_conv5(self.btnk_conv4(y)) + x)


class RepMLPResNet(nn.Module):
    """RepMLP-ResNet: (N, in_channels, H, W) float -> (N, classes) logits.

    The state dict has the keys of the official release.

    Args:
        spec: the hyper-parameters.
        deploy: build every block and convolution in its merged form.

    Raises:
        ValueError: sizes that do not fit one another.
    """

    def __init__(self, spec: RepMLPResNetSpec, *, deploy: bool = False) -> None:
        super().__init__()
        self.spec = spec
        if any(edge % 16 for edge in spec.input_size):
            raise ValueError(f"input size is {spec.input_size[0]}x{spec.input_size[1]}; it must be multiples of 16")
        stem = MergeableConvBN(spec.in_channels, spec.stem, 7, stride=2, relu=True, deploy=deploy)
        self.stage0 = nn.Sequential(stem, nn.MaxPool2d(3, stride=2, padding=1))
        before = spec.stem
        for i, (depth, channels) in enumerate(zip(spec.depths, spec.channels, strict=True)):
            first = ResNetUnit(before, channels, stride=2 if i else 1, deploy=deploy)
            rest = [_unit(spec, i, deploy=deploy) for _ in range(depth - 1)]
            self.add_module(f"stage{i + 1}", nn.Sequential(first, *rest))
            before = channels
        self.linear = nn.Linear(before, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        require_input(x, self.spec.in_channels, self.spec.input_size)
        x = self.stage0(x)  # (N, in_channels, H, W) -> (N, stem, H/4, W/4)
        for i in range(len(self.spec.depths)):
            x = self.get_submodule(f"stage{i + 1}")(x)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))  # (N, C, H, W) -> (N, C)
        return logits

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Merge every block and convolution in place; `merge_branches` leaves its input untouched."""
        switch_blocks(self)


def _shortcut(in_channels: int, channels: int, stride: int, *, deploy: bool) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return MergeableConvBN(in_channels, channels, 1, stride=stride, deploy=deploy)


def _unit(spec: RepMLPResNetSpec, stage: int, *, deploy: bool) -> nn.Module:
    """Build a unit of `stage` without a stride."""
    channels = spec.channels[stage]
    if stage not in _REPMLP_STAGES:
        return ResNetUnit(channels, channels, stride=1, deploy=deploy)
    r = spec.squeeze[_REPMLP_STAGES.index(stage)]
    middle = channels // 8 if spec.block == "light" else channels // 4 // r
    repmlp = RepMLP(
        middle,
        middle,
        _map_size(spec.input_size, stage),
        spec.partition,
        groups=spec.groups,
        kernels=spec.kernels,
        reduction=spec.reduction,
        deploy=deploy,
    )
    return (LightUnit if spec.block == "light" else BottleneckUnit)(channels, repmlp, deploy=deploy)


def _map_size(input_size: tuple[int, int], stage: int) -> tuple[int, int]:
    """Return (H, W) of the map that a stage works on."""
    stride = _STRIDE_BEFORE * 2**stage
    return input_size[0] // stride, input_size[1] // stride


def infer_repmlp_resnet(shapes: Mapping[str, Sequence[int]], input_size: tuple[int, int] | None) -> RepMLPResNetSpec:
    """Infer the hyper-parameters of a RepMLP-ResNet from the keys and shapes of its state dict.

    Args:
        shapes: state-dict key to shape, trained or merged.
        input_size: (H, W), where shapes cannot tell it: they hold areas, which are taken for squares otherwise.

    Raises:
        KeyError: a key that every RepMLP-ResNet has is missing.
        ValueError: the shapes fit no RepMLP-ResNet, or only with an `input_size`.
    """
    stem = shapes["stage0.0.conv.weight"]  # (stem, in_channels, 7, 7)
    block: Literal["light", "bottleneck"] = "light" if any(".light_repmlp." in key for key in shapes) else "bottleneck"
    short = "light" if block == "light" else "btnk"
    depths = [count_layers(shapes, f"stage{i}.") for i in range(1, 5)]
    channels = [shapes[f"stage{i}.0.conv3.conv.weight"][0] for i in range(1, 5)]
    found = [stage for stage in _REPMLP_STAGES if depths[stage] > 1]
    if not found:
        raise KeyError(f"stage2.1.{short}_repmlp.fc3.weight")
    conv = f"{short}_conv{1 if block == 'light' else 2}.conv.weight"  # (C, …), what the block reads
    blocks = {
        stage: read_block(
            shapes, f"stage{stage + 1}.1.{short}_repmlp.", channels=shapes[f"stage{stage + 1}.1.{conv}"][0]
        )
        for stage in found
    }
    first = blocks[found[0]]
    if input_size is None:
        input_size = square_input([(_STRIDE_BEFORE * 2**stage, found_block) for stage, found_block in blocks.items()])
    squeeze = [2, 4]
    for stage in found:
        squeeze[_REPMLP_STAGES.index(stage)] = max(1, channels[stage] // 4 // blocks[stage].channels)
    return RepMLPResNetSpec.model_validate(
        {
            "input_size": input_size,
            "block": block,
            "depths": depths,
            "channels": channels,
            "stem": stem[0],
            "partition": partition_of(first.area, [_map_size(input_size, stage) for stage in found]),
            "groups": first.groups,
            "kernels": first.kernels,
            "reduction": first.reduction,
            "squeeze": squeeze if block == "bottleneck" else (2, 4),
            "in_channels": stem[1],
            "classes": shapes["linear.weight"][0],
        }
    )
